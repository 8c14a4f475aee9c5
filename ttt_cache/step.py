"""The streaming form: one token for every row, in place.

Rows are in different phases of their chunks, so the memory takes in one token per step and
publishes a version at its boundary. On a device where steps are captured, as Moshi's CUDA graphs
are, what does not apply to a row is computed and masked away: nothing in Python depends on data.
The CPU captures nothing, and there it is not computed (`rows.py`).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import bare, recent
from .attention import softmax
from .memory import TTT, Frames, Memory, MemoryState, QueryReader, VirtualTokens
from .precision import full_precision
from .ready import read
from .recent import Slot
from .rows import change, unless_all
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
    if bare.is_bare(cache, state):
        return bare.step(cache, q, k, v, state, mask)
    token = state.count + 1
    attended = scores = values = None
    if cache.window.capacity:
        scores, values = _look_back(cache, q, k, v, state, token, mask)
        if cache.needs_window_output:
            attended = _mixed(softmax(scores), values)
    frames = Frames(x, q, k, v, attended)
    if cache.memory is not None:
        remember(cache, cache.memory.features(frames), state, token, mask)
    state.count.add_(mask)
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
) -> tuple[Tensor, list[Tensor]]:
    """Keep the token, and score window and sinks.

    Returns:
        scores `[B, Hkv, R, 1, L]`, -inf where the query may not look, and the values of window and
        sinks, `[B, Hkv, *, D]`.
    """
    window = cache.window
    turned_q, gone = keep(cache, q, k, v, state, token, mask), window.evicted(token)
    hidden = recent.ages(token, window.capacity) >= (token - gone)[:, None]  # [B, W]
    # Queries are scaled, not scores: float16 would overflow before the scale brings it back.
    turned_q = cache.by_key_head(turned_q)[:, :, :, 0] * cache.scale  # [B, Hkv, R, D]
    scores, values = recent.score(turned_q, state.keys), [state.values]
    if window.sinks:
        _keep_sink(cache, k, v, state, token, mask)
        plain_q = cache.by_key_head(q)[:, :, :, 0] * cache.scale
        scores = torch.cat([scores, recent.score(plain_q, state.sink_keys)], dim=-1)
        values.append(state.sink_values)
        index = torch.arange(1, window.sinks + 1, device=q.device)
        hidden = torch.cat([hidden, index > gone[:, None]], dim=1)
    return scores.masked_fill_(hidden[:, None, None], float("-inf")).unsqueeze(3), values


def keep(
    cache: HierarchicalCache,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: CacheState,
    token: Tensor,
    mask: Tensor,
) -> Tensor:
    """Put the token into the ring; returns the query after RoPE, `[B, H, 1, D]`."""
    turned_q, turned_k = cache.rotate(q, k, state.count)
    slot, only = Slot.of(token, cache.window.capacity), unless_all(mask)
    slot.write(state.keys, turned_k[:, :, 0], only)
    slot.write(state.values, v[:, :, 0], only)
    return turned_q


def _mixed(weights: Tensor, values: list[Tensor]) -> Tensor:
    """What weights `[B, Hkv, R, 1, L]` make of the values of window and sinks, `[B, H, 1, D]`."""
    parts = weights.squeeze(3).split([part.shape[2] for part in values], dim=-1)
    mixed = [recent.mix(w, part) for w, part in zip(parts, values, strict=True)]
    return sum(mixed[1:], mixed[0]).flatten(1, 2).unsqueeze(2)


def _keep_sink(
    cache: HierarchicalCache, k: Tensor, v: Tensor, state: CacheState, token: Tensor, mask: Tensor
) -> None:
    window = cache.window
    first = mask & (token <= window.sinks)
    _, key = cache.rotate(k, k, token - window.capacity - window.sinks)
    slot = Slot.of(token, window.sinks)
    slot.write(state.sink_keys, key[:, :, 0], first)
    slot.write(state.sink_values, v[:, :, 0], first)


def remember(
    cache: HierarchicalCache, features: Tensor, state: CacheState, token: Tensor, mask: Tensor
) -> None:
    """Feed the token whose turn it is; at a chunk's end publish the next version."""
    memory, window = cache.memory, cache.window
    assert memory is not None
    leaving = features[:, 0]
    if window.wait:
        slot = Slot.of(token, window.wait)
        leaving = slot.read(state.features)[:, 0]  # N tokens ago, its slot is reused
        slot.write(state.features, features, unless_all(mask))
    fed = token - window.wait
    feeding = mask & (fed > 0)
    with full_precision(features):
        change(feeding & (fed == 1), state.memory, memory.begin)
        change(feeding, state.memory, memory.take, leaving)
        versions = {**state.memory, "readout": state.readout}
        change(feeding & (fed % window.chunk == 0), versions, partial(_publish, memory))


def _publish(memory: Memory, state: MemoryState) -> None:
    """Close the chunk and read the version that it makes, in place."""
    memory.close(state)
    state["readout"].copy_(memory.read(state, state["readout"].shape[0]))


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
    values: list[Tensor],
    state: CacheState,
) -> Tensor:
    assert cache.gate is not None
    q = cache.by_key_head(q)
    # By the count, not the token: a row outside the mask has not written what its token would.
    written = cache.written(state.count)[:, None, None, None, None]
    virtual, mix = read(cache, reader, q, state)
    virtual = virtual.masked_fill_(~written, float("-inf"))
    on_recent, on_virtual = cache.gate(scores, virtual, written, q)
    return _mixed(on_recent, values) + mix(on_virtual).flatten(1, 2)
