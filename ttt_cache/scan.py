"""The memory over many tokens: all versions of a call, and the queries that read them.

Rows may be in different phases of their chunks, so each row's tokens are laid on a grid that begins
with its running chunk; places of the grid without a token hold zeros, which no memory notices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import recent
from .memory import Memory, MemoryState
from .recent import Window
from .span import Span
from .state import CacheState, choose, per_row

if TYPE_CHECKING:
    from .cache import HierarchicalCache


def versions(
    cache: HierarchicalCache, features: Tensor, span: Span, old: CacheState
) -> tuple[Tensor, MemoryState]:
    """Feed what leaves the window during the call, chunk by chunk.

    Args:
        features: `[B, 1, N + T, F]`, of the last N old tokens and the new ones.

    Returns:
        read-outs of the version at the start and after each chunk of the grid, `[B, V, *]`, and the
        state of the memory at the end.
    """
    memory, window = cache.memory, cache.window
    if memory is None:
        return old.readout[:, None], old.memory
    before, after = window.fed(old.count), window.fed(old.count + span.length)  # [B]
    chunks = _grid_chunks(window, span)
    base = window.evicted(old.count)
    token = base[:, None] + torch.arange(1, chunks * window.chunk + 1, device=base.device)
    cells = (chunks, window.chunk)
    valid = ((token > before[:, None]) & (token <= after[:, None])).unflatten(1, cells)
    column = (token - old.count[:, None] + window.recent - 1).clamp(0, features.shape[2] - 1)
    grid = recent.take(features, column)[:, 0].unflatten(1, cells)  # [B, chunks, C, F]
    complete = base[:, None] + torch.arange(1, chunks + 1, device=base.device) * window.chunk
    complete = complete <= after[:, None]  # [B, chunks]
    with cache.full_precision(features.device.type):
        state = choose(before == 0, memory.initial(base.shape[0]), old.memory)
        return _scan(memory, state, old.readout, grid, valid, complete, cache.config.bptt)


def _grid_chunks(window: Window, span: Span) -> int:
    """Chunks of the grid: as many as any row can touch, a number known without looking at rows."""
    if span.fresh:
        return -(-max(0, span.length - window.recent) // window.chunk)
    return -(-(window.chunk - 1 + span.length) // window.chunk)


def _scan(
    memory: Memory,
    state: MemoryState,
    readout: Tensor,
    grid: Tensor,
    valid: Tensor,
    complete: Tensor,
    bptt: int | None,
) -> tuple[Tensor, MemoryState]:
    readouts = [readout]
    steps = zip(grid.unbind(1), valid.unbind(1), complete.unbind(1), strict=True)
    for index, (tokens, is_token, closes) in enumerate(steps):
        if bptt is not None and index and index % bptt == 0:
            state = {name: tensor.detach() for name, tensor in state.items()}
        partial = memory.feed_chunk(state, tokens, is_token)
        closed = memory.finish(partial)
        state = choose(closes, closed, partial)
        read = memory.read(closed, closes.shape[0])
        readout = torch.where(per_row(closes, read), read, readout)
        readouts.append(readout)
    return torch.stack(readouts, dim=1), state


def gated(
    cache: HierarchicalCache, q: Tensor, scores: Tensor, readouts: Tensor, span: Span
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
    memory, gate, window = cache.memory, cache.gate, cache.window
    assert memory is not None and gate is not None
    groups = (span.tokens.shape[1] // window.chunk, window.chunk)
    current = window.version(span.tokens) - window.version(span.start)[:, None]  # [B|1, T'], from 0
    first = current[:, :: window.chunk]  # [B|1, G]
    pair = torch.stack([first, first + 1], dim=-1)
    rows = torch.arange(q.shape[0], device=q.device)[:, None, None]
    readout = readouts[rows, pair.clamp(max=readouts.shape[1] - 1)]  # [B, G, 2, *]
    written = span.gone > 0
    visible = current.unflatten(1, groups)[..., None] == pair[:, :, None]  # [B|1, G, C, 2]
    visible = visible & written.unflatten(1, groups)[..., None]
    visible = visible.repeat_interleave(memory.slots, dim=-1)[:, None, None]
    virtual = memory.score(q.unflatten(3, groups), readout)
    virtual = virtual.masked_fill(~visible, float("-inf")).flatten(3, 4)
    on_recent, on_virtual = gate(scores, virtual, written[:, None, None, :, None], q)
    return on_recent, memory.mix(on_virtual.unflatten(3, groups), readout).flatten(3, 4)
