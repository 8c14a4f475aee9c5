"""Where the tokens of one parallel call stand, for every row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .recent import Window

MIN_BLOCK = 64  # queries per block at least: fewer would make small matrices


@dataclass(frozen=True)
class Span:
    """T new tokens after `start` old ones, padded to T' = `blocks * block` queries.

    All rows are in step when there is no state before; then one row of positions serves them all,
    which is the 1 in `[B|1]`.

    Attributes:
        fresh: no row had any token before.
        start: tokens before the call, `[B|1]`.
        length: new tokens, T.
        block: queries per block, a multiple of the chunk; `blocks` of them.
        history: columns of older tokens in front of the new ones.
        tokens: number of each new token, `[B|1, T']`, from 1.
        gone: evicted tokens when it asks, `[B|1, T']`.
    """

    fresh: bool
    start: Tensor
    length: int
    block: int
    blocks: int
    history: int
    tokens: Tensor
    gone: Tensor

    @classmethod
    def after(cls, window: Window, count: Tensor | None, length: int, device) -> Span:
        """The span of `length` tokens after `count` `[B]` tokens (`None`: after none)."""
        largest = _round_up(max(MIN_BLOCK, window.capacity), window.chunk)
        block = min(largest, _round_up(length, window.chunk))
        blocks = -(-length // block)
        start = torch.zeros(1, dtype=torch.long, device=device) if count is None else count
        tokens = start[:, None] + torch.arange(1, blocks * block + 1, device=device)
        history = 0 if count is None and blocks == 1 else window.capacity
        gone = window.evicted(tokens)
        return cls(count is None, start, length, block, blocks, history, tokens, gone)

    @property
    def padding(self) -> int:
        """Queries without a token at the end, T' - T."""
        return self.block * self.blocks - self.length


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
