"""The ring of recent frames: which slot holds which token, and who has left the window.

Tokens are numbered from 1 in the order in which a row executes them; token `i` of a ring with
`capacity` slots lives in slot `(i - 1) % capacity`. Rows count for themselves, so all positions are
tensors and nothing here synchronises with the host. A ring is a tensor `[B, H, capacity, D]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .rows import captured


@dataclass(frozen=True)
class Window:
    """How much is kept exactly, and when the memory takes in what.

    Attributes:
        recent: tokens kept, N; 0 for no window at all.
        chunk: tokens that make one memory version, C.
        sinks: first tokens kept for ever, S.
        arrived: the memory takes in tokens as they arrive, not as they leave.
    """

    recent: int
    chunk: int
    sinks: int
    arrived: bool = False

    @property
    def capacity(self) -> int:
        """The most tokens a query sees exactly, W; those of a chunk leave together."""
        return self.recent if self.arrived else self.recent + self.chunk - 1

    @property
    def wait(self) -> int:
        """Tokens between the arrival of a token and the step in which the memory takes it in."""
        return 0 if self.arrived else self.recent

    def evicted(self, tokens: Tensor) -> Tensor:
        """Tokens that have left the window when the n-th asks; int64, any shape."""
        if self.arrived:
            return (tokens - self.recent).clamp(min=0)
        return self.version(tokens) * self.chunk

    def version(self, tokens: Tensor) -> Tensor:
        """The newest memory version when the n-th token asks."""
        return self.fed(tokens) // self.chunk

    def fed(self, tokens: Tensor) -> Tensor:
        """Tokens that the memory has taken in when the n-th asks."""
        return (tokens - self.wait).clamp(min=0)


def ages(count: Tensor, capacity: int) -> Tensor:
    """Age of every slot's token after `count` tokens: 0 is the newest. `[B]` -> `[B, capacity]`.

    A slot that was never written has an age of at least `count`.
    """
    slots = torch.arange(capacity, device=count.device)
    return (count[:, None] - 1 - slots) % max(capacity, 1)


class Slot(NamedTuple):
    """Each row's slot for one token: an index into rings of one capacity."""

    rows: Tensor
    slots: Tensor

    @classmethod
    def of(cls, token: Tensor, capacity: int) -> Slot:
        """That of each row's `token`, `[B]`, 1-based."""
        return cls(torch.arange(len(token), device=token.device), (token - 1) % capacity)

    def read(self, ring: Tensor) -> Tensor:
        """What stands there, `[B, H, D]`."""
        return ring[self.rows, :, self.slots]

    def write(self, ring: Tensor, value: Tensor, mask: Tensor | None) -> None:
        """Put `value` `[B, H, D]` there, in place; rows outside `mask` `[B]` keep their bits.

        Only the slots are touched, not the whole ring.
        """
        value = value.to(ring.dtype)
        if mask is not None:
            value = torch.where(mask[:, None, None], value, self.read(ring))
        ring[self.rows, :, self.slots] = value


def score(q: Tensor, ring: Tensor) -> Tensor:
    """Scores of queries `[B, H, R, D]` with a ring's tokens `[B, H, W, D]`: `[B, H, R, W]`."""
    # This way round a CPU reads the ring in order: where it does not fit the CPU's caches, that
    # takes a third of the time.
    return (ring @ q.transpose(-1, -2)).transpose(-1, -2)


def mix(weights: Tensor, ring: Tensor) -> Tensor:
    """Weighted sums of a ring's tokens: `[B, H, R, W]`, `[B, H, W, D]` -> `[B, H, R, D]`."""
    if captured(ring.device):
        return weights @ ring
    # A product with so few rows does not read the ring in order; a sum of an embedding's rows does.
    tokens, starts = _bags(ring.shape[:2].numel(), *weights.shape[2:])
    # Under autocast weights are narrower than the ring.
    table, shares = ring.reshape(-1, ring.shape[3]), weights.to(ring.dtype).reshape(-1)
    found = embedding_bag(tokens, table, starts, mode="sum", per_sample_weights=shares)
    return found.view(*weights.shape[:3], -1).to(weights.dtype)


@lru_cache(maxsize=8)
def _bags(rings: int, queries: int, capacity: int) -> tuple[Tensor, Tensor]:
    """The tokens that are summed among those of all rings, by query, and where each query's begin.

    Made once: in a step for one row that takes as long as the sum itself.
    """
    with torch.inference_mode(False):  # they outlive it
        tokens = torch.arange(rings * capacity).view(rings, 1, capacity).expand(-1, queries, -1)
        return tokens.flatten(), torch.arange(rings * queries) * capacity


def take(columns: Tensor, index: Tensor) -> Tensor:
    """Pick `index` `[B, K]` along the third axis of `[B, H, L, D]`, per row: `[B, H, K, D]`."""
    heads, width = columns.shape[1], columns.shape[3]
    return columns.gather(2, index[:, None, :, None].expand(-1, heads, -1, width))


def in_order(ring: Tensor, count: Tensor) -> Tensor:
    """The ring from oldest to newest after `count` `[B]` tokens; unwritten slots come first."""
    capacity = ring.shape[2]
    steps = torch.arange(capacity, device=ring.device)
    return take(ring, (count[:, None] + steps) % max(capacity, 1))


def from_order(columns: Tensor, count: Tensor, capacity: int) -> Tensor:
    """A ring after `count` `[B]` tokens, the last column being the newest token.

    `columns` is `[B, H, L, D]` with `L >= capacity`.
    """
    return take(columns, columns.shape[2] - 1 - ages(count, capacity))
