"""The memory over many tokens: all versions of a call, and the queries that read them.

Rows may be in different phases of their chunks, so each row's tokens are laid on a grid that begins
with its running chunk; places of the grid without a token hold zeros, which no memory notices.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from . import recent
from .memory import TTT, Memory, MemoryState
from .precision import full_precision
from .recent import Window
from .rows import choose, per_row
from .span import Span
from .state import CacheState

if TYPE_CHECKING:
    from .cache import HierarchicalCache

PART = 2**24  # bytes of memory versions that are made again together on the way back


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


def versions(
    cache: HierarchicalCache, memory: Memory, features: Tensor, span: Span, old: CacheState
) -> tuple[Tensor, Tensor, MemoryState]:
    """Feed the memory, for queries that read published versions.

    Args:
        features: `[B, 1, wait + T, F]`, of the tokens that waited and the new ones.

    Returns:
        read-outs of the version at the start and after each chunk of the grid, `[B, V, *]`, the one
        of the newest version, `[B, *]`, and the state of the memory at the end.
    """
    grid, readouts = Grid.of(cache.window, span), [old.readout[:, None]]
    state, weights = _start(cache, memory, old), cache.weights("memory")

    def read(versions: MemoryState, shape: tuple[int, int], *given: Tensor) -> Tensor:
        bound = {n.removeprefix("memory."): w for n, w in zip(weights, given, strict=True)}
        return functional_call(memory, bound, (versions, shape))

    with full_precision(features):
        for part in _parts(cache, grid, features, span, state):
            made, state = memory.scan(part.begin(state), part.tokens, part.valid, part.closes)
            # Made again on the way back. Weights are arguments: `functional_call` may have lent
            # them to the cache.
            found = checkpoint(
                read, made, part.closes.t().shape, *weights.values(),
                use_reentrant=False, preserve_rng_state=False,
            )  # fmt: skip
            assert found is not None
            readouts.append(found)
    found = torch.cat(readouts, dim=1)
    closed = grid.complete.sum(1).expand(found.shape[0])
    return found, found[torch.arange(found.shape[0], device=found.device), closed], state


def answers(
    cache: HierarchicalCache,
    memory: TTT,
    features: Tensor,
    queries: Tensor,
    span: Span,
    old: CacheState,
) -> tuple[Tensor, Tensor, MemoryState]:
    """Feed the memory, and answer each token's own query on the way.

    The query of the token that arrives when a place's token is taken in stands in the same place;
    a chunk's last query is answered by the closed chunk.

    Args:
        features: `[B, 1, wait + T, F]`, of the tokens that waited and the new ones.
        queries: unit vectors of the new tokens, `[B, h, T, d]`.

    Returns:
        answers `[B, T, E]`, without meaning for tokens that read no version, the read-out of the
        newest version, and the state of the memory at the end.
    """
    window, grid = cache.window, Grid.of(cache.window, span)
    place = (grid.token + window.wait - span.start[:, None] - 1).clamp(0, span.length - 1)
    asked = recent.take(queries, place.expand(queries.shape[0], -1))
    asked = asked.unflatten(2, (-1, window.chunk)).permute(2, 0, 1, 3, 4)  # [K, B, h, C, d]
    state, newest, found = _start(cache, memory, old), old.readout, []
    with full_precision(features):
        for part in _parts(cache, grid, features, span, state):
            queries, start = asked[part.chunks], part.begin(state)
            closed, state = memory.scan(start, part.tokens, part.valid, part.closes)
            if window.arrived:
                before = _shifted(closed, start)
                running = memory.running(before, part.tokens, part.valid, queries)
            else:
                running = memory.answer(_shifted(closed, memory.published(newest)), queries)
            last = memory.answer(closed, queries[:, :, :, -1:])
            last = torch.where(part.closes.t()[..., None, None], last, running[:, :, -1:])
            found.append(torch.cat([running[:, :, :-1], last], dim=2))
            newest = part.newest(memory, closed, newest)
    if not found:  # every token waits
        return queries.new_zeros(queries.shape[0], span.length, memory.latent_dim), newest, state
    return (
        _off_the_grid(torch.cat(found).transpose(0, 1).flatten(1, 2), window, grid, span),
        newest,
        state,
    )


def _shifted(versions: MemoryState, start: MemoryState) -> MemoryState:
    """Of the weights after each chunk, `[K, B, *]`, and at the start: those before each chunk."""
    return {name: torch.cat([start[name][None], w[:-1]]) for name, w in versions.items()}


def _off_the_grid(found: Tensor, window: Window, grid: Grid, span: Span) -> Tensor:
    """What stands in the place of each new token's query, of `[B, K C, E]`: `[B, T, E]`."""
    first = span.start[:, None] - window.wait - grid.token[:, :1] + 1
    column = first + torch.arange(span.length, device=first.device)
    column = column.clamp(0, found.shape[1] - 1).expand(found.shape[0], -1)
    return recent.take(found[:, None], column)[:, 0]


def _start(cache: HierarchicalCache, memory: Memory, old: CacheState) -> MemoryState:
    """The state to go on from: version 0 for rows that have fed nothing."""
    fed = cache.window.fed(old.count)
    return choose(fed == 0, memory.initial(fed.shape[0]), old.memory)


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


def _parts(
    cache: HierarchicalCache, grid: Grid, features: Tensor, span: Span, state: MemoryState
) -> Iterator[Part]:
    """The grid, some chunks at a time: what a part needs going back does not pile up."""
    window, bptt = cache.window, cache.config.bptt
    batch, (_, chunks) = features.shape[0], grid.complete.shape
    column = (grid.token - span.start[:, None] + window.wait - 1).clamp(0, features.shape[2] - 1)
    laid = recent.take(features, column.expand(batch, -1))[:, 0].unflatten(1, (-1, window.chunk))
    valid = grid.valid.expand(batch, -1).unflatten(1, (-1, window.chunk))
    complete = grid.complete.expand(batch, -1)
    horizons = set(range(0, chunks, bptt)) if bptt else {0}
    most = max(1, PART // max(1, sum(part.nbytes for part in state.values())))
    bounds = sorted(horizons | {*range(0, chunks, most), chunks})
    sizes = [end - start for start, end in pairwise(bounds)]
    split = zip(*(z.split(sizes, dim=1) for z in (laid, valid, complete)), strict=True)
    for start, size, part in zip(bounds, sizes, split, strict=False):
        yield Part(slice(start, start + size), *part, cut=start > 0 and start in horizons)
