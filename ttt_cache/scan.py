"""The memory over many tokens: all versions of a call, and the queries that read them.

Rows may be in different phases of their chunks, so each row's tokens are laid on a grid that begins
with its running chunk; places of the grid without a token hold zeros, which no memory notices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import recent
from .memory import TTT, Memory, MemoryState, VirtualTokens
from .precision import full_precision
from .recent import Window
from .rows import choose, per_row
from .span import Span
from .state import CacheState

if TYPE_CHECKING:
    from .cache import HierarchicalCache


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
) -> tuple[Tensor, MemoryState]:
    """Feed the memory chunk by chunk, for queries that read published versions.

    Args:
        features: `[B, 1, wait + T, F]`, of the tokens that waited and the new ones.

    Returns:
        read-outs of the version at the start and after each chunk of the grid, `[B, V, *]`, and the
        state of the memory at the end.
    """
    grid, readouts = Grid.of(cache.window, span), [old.readout]
    state = _start(cache, memory, old)
    with full_precision(features):
        for tokens, valid, closes in _cells(cache.window, grid, features, span):
            state = _truncate(state, len(readouts) - 1, cache.config.bptt)
            partial = memory.feed_chunk(state, tokens, valid)
            closed = memory.finish(partial)
            state = choose(closes, closed, partial)
            read = memory.read(closed, closes.shape[0])
            readouts.append(torch.where(per_row(closes, read), read, readouts[-1]))
    return torch.stack(readouts, dim=1), state


def answers(
    cache: HierarchicalCache,
    memory: TTT,
    features: Tensor,
    queries: Tensor,
    span: Span,
    old: CacheState,
) -> tuple[Tensor, Tensor, MemoryState]:
    """Feed the memory chunk by chunk, and answer each token's own query on the way.

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
    asked = recent.take(queries, place.expand(queries.shape[0], -1)).split(window.chunk, dim=2)
    state, readout, found = _start(cache, memory, old), old.readout, []
    with full_precision(features):
        cells = _cells(window, grid, features, span)
        for index, (tokens, valid, closes) in enumerate(cells):
            state = _truncate(state, index, cache.config.bptt)
            if window.arrived:
                partial, running = memory.feed_and_answer(state, tokens, valid, asked[index])
            else:
                partial = memory.feed_chunk(state, tokens, valid)
                running = memory.answer(memory.published(readout), asked[index])
            closed = memory.finish(partial)
            last = memory.answer(closed, asked[index][:, :, -1:])
            last = torch.where(per_row(closes, last), last, running[:, -1:])
            found.append(torch.cat([running[:, :-1], last], dim=1))
            state = choose(closes, closed, partial)
            read = memory.read(closed, closes.shape[0])
            readout = torch.where(per_row(closes, read), read, readout)
    if not found:  # every token waits
        return queries.new_zeros(queries.shape[0], span.length, memory.latent_dim), readout, state
    return _off_the_grid(torch.cat(found, dim=1), window, grid, span), readout, state


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


def _truncate(state: MemoryState, index: int, bptt: int | None) -> MemoryState:
    if bptt is None or index == 0 or index % bptt:
        return state
    return {name: tensor.detach() for name, tensor in state.items()}


def _cells(
    window: Window, grid: Grid, features: Tensor, span: Span
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Chunk by chunk: features `[B, C, F]`, which of them are tokens, which rows close."""
    batch = features.shape[0]
    column = (grid.token - span.start[:, None] + window.wait - 1).clamp(0, features.shape[2] - 1)
    laid = recent.take(features, column.expand(batch, -1))[:, 0]
    valid, complete = grid.valid.expand(batch, -1), grid.complete.expand(batch, -1)
    cells = (complete.shape[1], window.chunk)
    by_chunk = (laid.unflatten(1, cells), valid.unflatten(1, cells), complete)
    return zip(*(part.unbind(1) for part in by_chunk), strict=True)


def gated(
    cache: HierarchicalCache,
    reader: VirtualTokens,
    q: Tensor,
    scores: Tensor,
    readouts: Tensor,
    span: Span,
) -> tuple[Tensor, Tensor]:
    """Let every query read the memory version of its moment.

    C neighbouring queries see at most two versions, so each group of C gets both and a mask.

    Args:
        q: before RoPE, `[B, Hkv, R, T', D]`.
        scores: over sinks and window, `[B, Hkv, R, T', L]`.
        readouts: `[B, V, *]` from `versions`.

    Returns:
        weights on sinks and window, shaped as `scores`, and what the memory adds to the output,
        `[B, Hkv, R, T', D]`.
    """
    gate, window = cache.gate, cache.window
    assert gate is not None
    groups = (span.tokens.shape[1] // window.chunk, window.chunk)
    current = window.version(span.tokens) - window.version(span.start)[:, None]  # [B|1, T'], from 0
    first = current[:, :: window.chunk]  # [B|1, G]
    pair = torch.stack([first, first + 1], dim=-1)
    rows = torch.arange(q.shape[0], device=q.device)[:, None, None]
    readout = readouts[rows, pair.clamp(max=readouts.shape[1] - 1)]  # [B, G, 2, *]
    written = cache.written(span.tokens)
    visible = current.unflatten(1, groups)[..., None] == pair[:, :, None]  # [B|1, G, C, 2]
    visible = visible & written.unflatten(1, groups)[..., None]
    visible = visible.repeat_interleave(reader.slots, dim=-1)[:, None, None]
    virtual = reader.score(q.unflatten(3, groups), readout)
    virtual = virtual.masked_fill(~visible, float("-inf")).flatten(3, 4)
    on_recent, on_virtual = gate(scores, virtual, written[:, None, None, :, None], q)
    return on_recent, reader.mix(on_virtual.unflatten(3, groups), readout).flatten(3, 4)
