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
from .state import CacheState, choose, per_row

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
    turned_q, turned_k = cache.rotate(q, k, state.count)
    recent.write(state.keys, token, turned_k[:, :, 0], mask)
    recent.write(state.values, token, v[:, :, 0], mask)
    if cache.window.sinks:
        _keep_sink(cache, k, v, state, token, mask)
    if cache.memory is not None:
        _remember(cache, cache.memory.features(x, k, v), state, token, mask)
    state.count.copy_(torch.where(mask, token, state.count))
    return _attend(cache, q, turned_q, state, token)


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
    """Feed the token that leaves the window; at a chunk's end publish the next version."""
    memory, window = cache.memory, cache.window
    assert memory is not None
    leaving = recent.read(state.features, token)[:, 0]  # N tokens ago, the slot about to be reused
    recent.write(state.features, token, features, mask)
    fed = token - window.recent
    with cache.full_precision(features.device.type):
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


def _attend(
    cache: HierarchicalCache, q: Tensor, turned_q: Tensor, state: CacheState, token: Tensor
) -> Tensor:
    window = cache.window
    gone = window.evicted(token)
    visible = recent.ages(token, window.capacity) < (token - gone)[:, None]  # [B, W]
    q, turned_q = cache.by_key_head(q), cache.by_key_head(turned_q)  # [B, Hkv, R, 1, D]
    # Queries are scaled, not scores: float16 would overflow before the scale brings it back.
    scores = (turned_q * cache.scale) @ state.keys[:, :, None].transpose(-1, -2)
    values = state.values
    if window.sinks:
        on_sinks = (q * cache.scale) @ state.sink_keys[:, :, None].transpose(-1, -2)
        scores = torch.cat([scores, on_sinks], dim=-1)
        values = torch.cat([values, state.sink_values], dim=2)
        index = torch.arange(1, window.sinks + 1, device=q.device)
        visible = torch.cat([visible, index <= gone[:, None]], dim=1)
    scores = scores.masked_fill(~visible[:, None, None, None], float("-inf"))
    values = values[:, :, None]
    if cache.memory is None or cache.gate is None:
        return (softmax(scores) @ values).flatten(1, 2)
    written = (gone > 0)[:, None, None, None, None]
    readout = state.readout[:, None, None]  # one group of one query, one version
    virtual = cache.memory.score(q.unsqueeze(3), readout).squeeze(3)
    virtual = virtual.masked_fill(~written, float("-inf"))
    on_recent, on_virtual = cache.gate(scores, virtual, written, q)
    remembered = cache.memory.mix(on_virtual.unsqueeze(3), readout).squeeze(3)
    return (on_recent @ values + remembered).flatten(1, 2)
