"""The memory over many tokens: all versions of a call, and the queries that read them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from . import recent
from .form import Form
from .grid import Grid, parts
from .memory import TTT, Memory, MemoryState
from .precision import full_precision
from .recent import Window
from .rows import choose
from .span import Span
from .state import CacheState

if TYPE_CHECKING:
    from .cache import HierarchicalCache


def versions(
    cache: HierarchicalCache,
    memory: Memory,
    features: Tensor,
    span: Span,
    old: CacheState,
    form: Form,
) -> tuple[Tensor, Tensor, MemoryState]:
    """Feed the memory, for queries that read published versions.

    Args:
        features: `[B, 1, wait + T, F]`, of the tokens that waited and the new ones.

    Returns:
        read-outs of the version at the start and after each chunk of the grid, `[B, V, *]`, the one
        of the newest version, `[B, *]`, and the state of the memory at the end.
    """
    grid, readouts = Grid.of(cache.window, span), [old.readout[:, None]]
    state = _start(cache, memory, old)
    with full_precision(features):
        for part in parts(cache, grid, features, span, state):
            given = part.begin(state), part.tokens, part.valid, part.closes
            if form.scans_again:
                found, state = _again(cache, memory, partial(_scan_and_read, form), *given)
            else:
                made, state = _scan(form, memory, *given)
                found = _again(cache, memory, _read, made, part.closes)
            readouts.append(found)
    found = torch.cat(readouts, dim=1)
    closed = grid.complete.sum(1).expand(found.shape[0])
    return found, found[torch.arange(found.shape[0], device=found.device), closed], state


def _scan(form: Form, memory: Memory, *given: Any) -> tuple[MemoryState, MemoryState]:
    """The versions of a part, and the state at its end."""
    return memory.scan(*given, run=form.run) if isinstance(memory, TTT) else memory.scan(*given)


def _read(memory: Memory, versions: MemoryState, closes: Tensor) -> Tensor:
    """The read-outs of versions `[K, B, *]` after chunks `[B, K]`: `[B, K, *]`."""
    rows, chunks = closes.shape
    flat = {name: t.flatten(0, 1) for name, t in versions.items()}
    return memory.read(flat, rows * chunks).unflatten(0, (chunks, rows)).transpose(0, 1)


def _scan_and_read(form: Form, memory: Memory, *given: Any) -> tuple[Tensor, MemoryState]:
    made, state = _scan(form, memory, *given)
    return _read(memory, made, given[-1]), state


class _Lent(nn.Module):
    """Calls a function of a memory, as a module to which weights can be lent."""

    def __init__(self, memory: Memory, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.memory, self.fn = memory, fn

    def forward(self, *given: Any) -> Any:
        return self.fn(self.memory, *given)


def _again(cache: HierarchicalCache, memory: Memory, fn: Callable[..., Any], *given: Any) -> Any:
    """`fn(memory, *given)`, of which nothing is kept: it is made again on the way back.

    Weights are arguments: `functional_call` may have lent them to the cache.
    """
    weights = cache.weights("memory")

    def call(*values: Tensor) -> Any:
        lent = dict(zip(weights, values, strict=True))
        return functional_call(_Lent(memory, fn), lent, given)

    return checkpoint(call, *weights.values(), use_reentrant=False, preserve_rng_state=False)


def answers(
    cache: HierarchicalCache,
    memory: TTT,
    features: Tensor,
    queries: Tensor,
    span: Span,
    old: CacheState,
    form: Form,
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
        for part in parts(cache, grid, features, span, state):
            queries, start = asked[part.chunks], part.begin(state)
            closed, state = memory.scan(start, part.tokens, part.valid, part.closes, run=form.run)
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
