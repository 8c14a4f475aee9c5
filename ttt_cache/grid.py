"""The chunks that a call feeds a memory: where every row's tokens stand, some chunks at a time.

Rows may be in different phases of their chunks, so each row's tokens are laid on a grid that begins
with its running chunk; places of the grid without a token hold zeros, which no memory notices.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import recent
from .memory import Memory, MemoryState
from .recent import Window
from .rows import per_row
from .span import Span

if TYPE_CHECKING:
    from .cache import HierarchicalCache

PART = 2**24  # bytes of a row's memory versions that are made again together on the way back


class Grid(NamedTuple):
    """Where the tokens stand that the memory takes in during a call.

    Attributes:
        token: the number of each place's token, `[B|1, K C]` for K chunks of C.
        valid: places whose token is taken in during the call, `[B|1, K C]`.
        complete: chunks that are full after the call, `[B|1, K]`.
    """

    token: Tensor
    valid: Tensor
    complete: Tensor

    @classmethod
    def of(cls, window: Window, span: Span) -> Grid:
        chunks, chunk = _chunks(window, span), window.chunk
        before, after = window.fed(span.start), window.fed(span.start + span.length)
        base = (window.version(span.start) * chunk)[:, None]
        token = base + torch.arange(1, chunks * chunk + 1, device=base.device)
        valid = (token > before[:, None]) & (token <= after[:, None])
        return cls(token, valid, token[:, chunk - 1 :: chunk] <= after[:, None])


def _chunks(window: Window, span: Span) -> int:
    """Chunks of the grid: as many as any row can touch, a number known without looking at rows."""
    if span.fresh:
        return -(-max(0, span.length - window.wait) // window.chunk)
    return -(-(window.chunk - 1 + span.length) // window.chunk)


class Part(NamedTuple):
    """Some chunks of the grid, laid out.

    Attributes:
        chunks: which.
        tokens: features `[B, K, C, F]`; valid: which of them are tokens, `[B, K, C]`.
        closes: which rows end which chunk, `[B, K]`.
        cut: whether gradients end at the start.
    """

    chunks: slice
    tokens: Tensor
    valid: Tensor
    closes: Tensor
    cut: bool

    def begin(self, state: MemoryState) -> MemoryState:
        return {name: t.detach() for name, t in state.items()} if self.cut else state

    def newest(self, memory: Memory, versions: MemoryState, readout: Tensor) -> Tensor:
        """The read-out of each row's newest version, which was `readout` at the start."""
        closed = self.closes.sum(1)
        rows = torch.arange(closed.shape[0], device=closed.device)
        chosen = {name: w[(closed - 1).clamp(min=0), rows] for name, w in versions.items()}
        read = memory.read(chosen, closed.shape[0])
        return torch.where(per_row(closed > 0, read), read, readout)


def parts(
    cache: HierarchicalCache,
    grid: Grid,
    features: Tensor,
    span: Span,
    state: MemoryState,
) -> Iterator[Part]:
    """The grid, some chunks at a time: what a part needs going back does not pile up."""
    window, bptt = cache.window, cache.config.bptt
    batch, (_, chunks) = features.shape[0], grid.complete.shape
    column = (grid.token - span.start[:, None] + window.wait - 1).clamp(0, features.shape[2] - 1)
    laid = recent.take(features, column.expand(batch, -1))[:, 0].unflatten(1, (-1, window.chunk))
    valid = grid.valid.expand(batch, -1).unflatten(1, (-1, window.chunk))
    complete = grid.complete.expand(batch, -1)
    horizons = set(range(0, chunks, bptt)) if bptt else {0}
    most = max(1, PART * batch // max(1, sum(part.nbytes for part in state.values())))
    bounds = sorted(horizons | {*range(0, chunks, most), chunks})
    sizes = [end - start for start, end in pairwise(bounds)]
    split = zip(*(z.split(sizes, dim=1) for z in (laid, valid, complete)), strict=True)
    for start, size, part in zip(bounds, sizes, split, strict=False):
        yield Part(slice(start, start + size), *part, cut=start > 0 and start in horizons)
