"""Where the tokens of one parallel call stand, for every row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .recent import Window

BLOCK = 96  # queries: fewer make small matrices, more score many keys that they may not see


class Block(NamedTuple):
    """Some queries of a call.

    Attributes:
        queries: which of the new tokens.
        columns: of the older and the new tokens together, those that any of the queries may see.
        old, new: the same, of each alone.
        groups: the queries in groups of a chunk, counted over the call; the last may be short.
    """

    queries: slice
    columns: slice
    old: slice
    new: slice
    groups: slice


@dataclass(frozen=True)
class Span:
    """T new tokens after `start` old ones.

    All rows are in step when there is no state before; then one row of positions serves them all,
    which is the 1 in `[B|1]`.

    Attributes:
        fresh: no row had any token before.
        start: tokens before the call, `[B|1]`.
        length: new tokens, T.
        history: columns of older tokens in front of the new ones.
        tokens: number of each new token, `[B|1, T]`, from 1.
        gone: evicted tokens when it asks, `[B|1, T]`.
        window: of the cache.
    """

    fresh: bool
    start: Tensor
    length: int
    history: int
    tokens: Tensor
    gone: Tensor
    window: Window

    @classmethod
    def after(cls, window: Window, count: Tensor | None, length: int, device) -> Span:
        """The span of `length` tokens after `count` `[B]` tokens (`None`: after none)."""
        start = torch.zeros(1, dtype=torch.long, device=device) if count is None else count
        tokens = start[:, None] + torch.arange(1, length + 1, device=device)
        history = 0 if count is None else window.capacity
        gone = window.evicted(tokens)
        return cls(count is None, start, length, history, tokens, gone, window)

    def blocks(self) -> Iterator[Block]:
        """The queries of the call, in order."""
        chunk, capacity = self.window.chunk, self.window.capacity
        size = -(-BLOCK // chunk) * chunk
        for start in range(0, self.length, size):
            stop = min(start + size, self.length)
            # The first query's own column is the last of the `capacity` that it may see.
            oldest = max(0, self.history + start + 1 - capacity)
            columns = slice(oldest, self.history + stop)
            old = slice(min(oldest, self.history), self.history)
            new = slice(max(oldest - self.history, 0), stop)
            groups = slice(start // chunk, -(-stop // chunk))
            yield Block(slice(start, stop), columns, old, new, groups)

    def hidden(self, block: Block) -> Tensor:
        """Columns that a query may not see, `[B|1, t, columns]`."""
        tokens, gone = self.tokens[:, block.queries, None], self.gone[:, block.queries, None]
        numbers = torch.arange(block.columns.start, block.columns.stop, device=tokens.device)
        columns = (self.start[:, None] + numbers + (1 - self.history))[:, None]
        return (columns <= gone) | (columns > tokens)

    def hidden_sinks(self, block: Block) -> Tensor:
        """Sinks that have not left the window, `[B|1, t, S]`."""
        index = torch.arange(1, self.window.sinks + 1, device=self.gone.device)
        return index > self.gone[:, block.queries, None]
