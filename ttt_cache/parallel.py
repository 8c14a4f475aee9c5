"""The parallel form: many tokens at once, `(inputs, state) -> (outputs, state)`, differentiable.

Queries are cut into blocks that attend to their own block and the window before it, so nothing is
T x T. The memory is a scan over chunks (`ttt_cache.scan`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import recent, scan
from .attention import softmax
from .span import Span
from .state import CacheState

if TYPE_CHECKING:
    from .cache import HierarchicalCache


def extend(
    cache: HierarchicalCache, q: Tensor, k: Tensor, v: Tensor, x: Tensor, state: CacheState | None
) -> tuple[Tensor, CacheState]:
    """Process T tokens of every row after `state` (`None`: empty).

    Args:
        q, k, v: before RoPE, `[B, H, T, D]` and `[B, Hkv, T, D]`.
        x: hidden states `[B, T, dim]`.

    Returns:
        outputs `[B, H, T, D]` and the new state; `state` itself is unchanged.
    """
    span = Span.after(cache.window, None if state is None else state.count, q.shape[2], q.device)
    old = cache.init_state(q.shape[0], device=k.device, dtype=k.dtype) if state is None else state
    turned_q, turned_k = cache.rotate(q, k, old.count)
    keys = torch.cat([recent.in_order(old.keys, old.count), turned_k], dim=2)
    values = torch.cat([recent.in_order(old.values, old.count), v], dim=2)
    features = cache.features(x, k, v)[:, None]
    features = torch.cat([recent.in_order(old.features, old.count), features], dim=2)
    sinks = _sinks(cache, k, v, span, old)
    versions, memory = scan.versions(cache, features, span, old)
    out = _attend(cache, q, turned_q, keys, values, sinks, versions, span)
    count = old.count + span.length
    new = CacheState(
        count=count,
        keys=recent.from_order(keys, count, old.keys.shape[2]),
        values=recent.from_order(values, count, old.values.shape[2]),
        sink_keys=sinks[0],
        sink_values=sinks[1],
        features=recent.from_order(features, count, old.features.shape[2]),
        memory=memory,
        readout=versions[:, -1],
    )
    return out, new


def _attend(
    cache: HierarchicalCache,
    q: Tensor,
    turned_q: Tensor,
    keys: Tensor,
    values: Tensor,
    sinks: tuple[Tensor, Tensor],
    versions: Tensor,
    span: Span,
) -> Tensor:
    def padded(x: Tensor) -> Tensor:  # [B, H, T, D] -> [B, Hkv, R, T', D]
        return cache.by_key_head(F.pad(x, (0, 0, 0, span.padding)))

    q = padded(q)
    scores = _window_scores(padded(turned_q * cache.scale), keys, span)
    sink_scores = (q * cache.scale) @ sinks[0][:, :, None].transpose(-1, -2)
    hidden = torch.arange(1, sinks[0].shape[2] + 1, device=q.device) > span.gone[..., None]
    sink_scores = sink_scores.masked_fill(hidden[:, None, None], float("-inf"))
    scores = torch.cat([sink_scores, scores], dim=-1)
    if cache.memory is None:
        weights, remembered = softmax(scores), None
    else:
        weights, remembered = scan.gated(cache, q, scores, versions, span)
    first = sink_scores.shape[-1]
    on_sinks, on_recent = weights[..., :first], weights[..., first:]
    blocked = on_recent.unflatten(3, (span.blocks, span.block))
    out = blocked @ _windows(values, span).transpose(-1, -2)
    out = out.flatten(3, 4) + on_sinks @ sinks[1][:, :, None]
    if remembered is not None:
        out = out + remembered
    return out.flatten(1, 2)[:, :, : span.length]


def _windows(columns: Tensor, span: Span) -> Tensor:
    """What each block of queries may see, of columns `[B, Hkv, W + T, D]`.

    Returns `[B, Hkv, 1, blocks, D, history + block]`. `unfold` instead of one slice per block,
    whose backward is quadratic in T.
    """
    unused = columns.shape[2] - span.length - span.history
    columns = F.pad(columns[:, :, unused:], (0, 0, 0, span.padding))
    return columns.unfold(2, span.history + span.block, span.block)[:, :, None]


def _window_scores(turned_q: Tensor, keys: Tensor, span: Span) -> Tensor:
    """`[B, Hkv, R, T', history + block]`, -inf outside tokens `gone + 1 .. n`."""
    blocked = (span.blocks, span.block)
    scores = turned_q.unflatten(3, blocked) @ _windows(keys, span)
    # Column c of the first block is token start - history + 1 + c; the last query's token ends it.
    tokens, gone = span.tokens.unflatten(1, blocked), span.gone.unflatten(1, blocked)
    width = span.history + span.block
    columns = tokens[:, :, -1:] - torch.arange(width - 1, -1, -1, device=keys.device)
    columns = columns[:, :, None]  # [B|1, blocks, 1, width]
    visible = (columns > gone[..., None]) & (columns <= tokens[..., None])
    return scores.masked_fill(~visible[:, None, None], float("-inf")).flatten(3, 4)


def _sinks(
    cache: HierarchicalCache, k: Tensor, v: Tensor, span: Span, old: CacheState
) -> tuple[Tensor, Tensor]:
    """The first S keys, turned to their constant distance from any query, and values."""
    sinks = cache.window.sinks
    if not sinks:
        return old.sink_keys, old.sink_values
    # Where the sinks stand among the new tokens, [B, S].
    position = torch.arange(sinks, device=k.device) - old.count[:, None]
    arrived = (position >= 0) & (position < span.length)
    index = position.clamp(0, span.length - 1)
    key, value = recent.take(k, index), recent.take(v, index)
    distance = torch.full_like(old.count, -(cache.window.capacity + sinks - 1))
    _, key = cache.rotate(key, key, distance)
    arrived = arrived[:, None, :, None]
    return torch.where(arrived, key, old.sink_keys), torch.where(arrived, value, old.sink_values)
