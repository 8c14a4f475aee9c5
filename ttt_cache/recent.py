"""The ring of recent frames: which slot holds which token, and who has left the window.

Tokens are numbered from 1 in the order in which a row executes them; token `i` of a ring with
`capacity` slots lives in slot `(i - 1) % capacity`. Rows count for themselves, so all positions are
tensors and nothing here synchronises with the host. A ring is a tensor `[B, H, capacity, D]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


def write(ring: Tensor, token: Tensor, value: Tensor, mask: Tensor) -> None:
    """Put each row's `token` (`[B]`, 1-based) with `value` `[B, H, D]` into its slot, in place.

    Rows outside `mask` `[B]` keep their bits. Only the slot is touched, not the whole ring.
    """
    rows = torch.arange(ring.shape[0], device=ring.device)
    slot = (token - 1) % ring.shape[2]
    kept = ring[rows, :, slot]
    ring[rows, :, slot] = torch.where(mask[:, None, None], value.to(ring.dtype), kept)


def read(ring: Tensor, token: Tensor) -> Tensor:
    """The slot of each row's `token` (`[B]`, 1-based): `[B, H, D]`."""
    rows = torch.arange(ring.shape[0], device=ring.device)
    return ring[rows, :, (token - 1) % ring.shape[2]]


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
