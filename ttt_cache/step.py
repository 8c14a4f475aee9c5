"""The streaming form: one token for every row, in place, nothing that depends on data in Python.

Rows are in different phases of their chunks, so the memory takes in one token per step and
publishes a version at its boundary; what does not apply to a row is computed and masked away. That
keeps the step static, as Moshi's CUDA graphs need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import recent
from .attention import softmax
from .memory import TTT, Frames, QueryReader, VirtualTokens
from .precision import full_precision
from .rows import choose, per_row
from .state import CacheState

if TYPE_CHECKING:
    from .cache import HierarchicalCache


def step(
    cache: HierarchicalCache,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor,
    state: CacheState,
    mask: Tensor,
) -> Tensor:
    """Answer one query per row and advance the rows of `mask`.

    Args:
        q, k, v: before RoPE, `[B, H, 1, D]` and `[B, Hkv, 1, D]`.
        x: hidden states `[B, 1, dim]`.
        mask: bool `[B]`. Other rows get an output without meaning and keep their state.

    Returns:
        `[B, H, 1, D]`.
    """
    token = state.count + 1
    attended = scores = values = None
    if cache.window.capacity:
        scores, values = _look_back(cache, q, k, v, state, token, mask)
        if cache.needs_window_output:
            attended = (softmax(scores) @ values).flatten(1, 2)
    frames = Frames(x, q, k, v, attended)
    if cache.memory is not None:
        _remember(cache, cache.memory.features(frames), state, token, mask)
    state.count.copy_(torch.where(mask, token, state.count))
    reader = cache.reader
    if isinstance(reader, QueryReader):
        return cache.mix(_ask(cache, reader, frames, state), attended, q, state.count[:, None])
    if isinstance(reader, VirtualTokens):
        assert scores is not None and values is not None
        return _attend(cache, reader, q, scores, values, state)
    assert attended is not None
    return attended


def _look_back(
    cache: HierarchicalCache,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: CacheState,
    token: Tensor,
    mask: Tensor,
) -> tuple[Tensor, Tensor]:
    """Keep the token, and score window and sinks: `[B, Hkv, R, 1, L]`, values `[B, Hkv, 1, L, D]`.

    Scores are -inf where the query may not look.
    """
    window = cache.window
    turned_q, turned_k = cache.rotate(q, k, state.count)
    recent.write(state.keys, token, turned_k[:, :, 0], mask)
    recent.write(state.values, token, v[:, :, 0], mask)
    gone = window.evicted(token)
    visible = recent.ages(token, window.capacity) < (token - gone)[:, None]  # [B, W]
    q, turned_q = cache.by_key_head(q), cache.by_key_head(turned_q)  # [B, Hkv, R, 1, D]
    # Queries are scaled, not scores: float16 would overflow before the scale brings it back.
    scores = (turned_q * cache.scale) @ state.keys[:, :, None].transpose(-1, -2)
    values = state.values
    if window.sinks:
        _keep_sink(cache, k, v, state, token, mask)
        on_sinks = (q * cache.scale) @ state.sink_keys[:, :, None].transpose(-1, -2)
        scores = torch.cat([scores, on_sinks], dim=-1)
        values = torch.cat([values, state.sink_values], dim=2)
        index = torch.arange(1, window.sinks + 1, device=q.device)
        visible = torch.cat([visible, index <= gone[:, None]], dim=1)
    scores = scores.masked_fill(~visible[:, None, None, None], float("-inf"))
    return scores, values[:, :, None]


def _keep_sink(
    cache: HierarchicalCache, k: Tensor, v: Tensor, state: CacheState, token: Tensor, mask: Tensor
) -> None:
    window = cache.window
    first = mask & (token <= window.sinks)
    _, key = cache.rotate(k, k, token - window.capacity - window.sinks)
    recent.write(state.sink_keys, token, key[:, :, 0], first)
    recent.write(state.sink_values, token, v[:, :, 0], first)


def _remember(
    cache: HierarchicalCache, features: Tensor, state: CacheState, token: Tensor, mask: Tensor
) -> None:
    """Feed the token whose turn it is; at a chunk's end publish the next version."""
    memory, window = cache.memory, cache.window
    assert memory is not None
    leaving = features[:, 0]
    if window.wait:
        leaving = recent.read(state.features, token)[:, 0]  # N tokens ago, its slot is reused
        recent.write(state.features, token, features, mask)
    fed = token - window.wait
    with full_precision(features):
        start = choose(fed == 1, memory.initial(fed.shape[0]), state.memory)
        partial = memory.feed(start, leaving)
        closed = memory.finish(partial)
        readout = memory.read(closed, fed.shape[0])
    boundary = fed % window.chunk == 0
    feeding = mask & (fed > 0)
    for name, new in choose(boundary, closed, partial).items():
        old = state.memory[name]
        old.copy_(torch.where(per_row(feeding, old), new, old))
    publish = per_row(feeding & boundary, readout)
    state.readout.copy_(torch.where(publish, readout, state.readout))


def _ask(
    cache: HierarchicalCache, reader: QueryReader, frames: Frames, state: CacheState
) -> Tensor:
    """What the memory answers to the token's own query, `[B, H, 1, D]`."""
    memory = cache.memory
    assert isinstance(memory, TTT)
    queries = reader.queries(memory, frames)
    with full_precision(queries):
        weights = state.memory if cache.window.arrived else memory.published(state.readout)
        answers = memory.answer(weights, queries)
    return reader.output(answers, frames.q.dtype)


def _attend(
    cache: HierarchicalCache,
    reader: VirtualTokens,
    q: Tensor,
    scores: Tensor,
    values: Tensor,
    state: CacheState,
) -> Tensor:
    assert cache.gate is not None
    q = cache.by_key_head(q)
    # By the count, not the token: a row outside the mask has not written what its token would.
    written = cache.written(state.count)[:, None, None, None, None]
    readout = state.readout[:, None, None]  # one group of one query, one version
    virtual = reader.score(q.unsqueeze(3), readout).squeeze(3)
    virtual = virtual.masked_fill(~written, float("-inf"))
    on_recent, on_virtual = cache.gate(scores, virtual, written, q)
    remembered = reader.mix(on_virtual.unsqueeze(3), readout).squeeze(3)
    return (on_recent @ values + remembered).flatten(1, 2)
