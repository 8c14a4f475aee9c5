"""The parallel form: many tokens at once, `(inputs, state) -> (outputs, state)`, differentiable.

Queries are cut into blocks that attend to their own block and the window before it, so nothing is
T x T. The memory is a scan over chunks (`ttt_cache.scan`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import recent, scan
from .attention import softmax
from .memory import TTT, Frames, QueryReader, VirtualTokens
from .span import Span
from .state import CacheState

if TYPE_CHECKING:
    from .cache import HierarchicalCache


class Attended(NamedTuple):
    """What the queries of a call see exactly.

    Attributes:
        scores: over sinks, then window: `[B, Hkv, R, T', S + history + block]`, -inf where a query
            may not look.
        sinks: values, `[B, Hkv, S, D]`.
        values: of the window of each block of queries, see `_windows`.
    """

    scores: Tensor
    sinks: Tensor
    values: Tensor

    def output(self, weights: Tensor) -> Tensor:
        """Values weighted, `[B, Hkv, R, T', D]`."""
        first, (blocks, block) = self.sinks.shape[2], (self.values.shape[3], -1)
        on_sinks, on_window = weights[..., :first], weights[..., first:]
        out = on_window.unflatten(3, (blocks, block)) @ self.values.transpose(-1, -2)
        return out.flatten(3, 4) + on_sinks @ self.sinks[:, :, None]


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
    new = replace(old, count=old.count + span.length)
    attended = output = None
    if cache.window.capacity:
        attended = _look_back(cache, q, k, v, span, old, new)
        if cache.needs_window_output:
            output = _cut(attended.output(softmax(attended.scores)), span)
    frames, reader, memory = Frames(x, q, k, v, output), cache.reader, cache.memory
    if memory is None:
        assert output is not None
        return output, new
    features = memory.features(frames)[:, None]
    features = torch.cat([recent.in_order(old.features, old.count), features], dim=2)
    new.features = recent.from_order(features, new.count, old.features.shape[2])
    if isinstance(reader, QueryReader):
        assert isinstance(memory, TTT)
        queries = reader.queries(memory, frames)
        found = scan.answers(cache, memory, features, queries, span, old)
        answers, new.readout, new.memory = found
        tokens = span.tokens[:, : span.length]
        return cache.mix(reader.output(answers, q.dtype), output, q, tokens), new
    assert isinstance(reader, VirtualTokens) and attended is not None
    versions, new.memory = scan.versions(cache, memory, features, span, old)
    new.readout = versions[:, -1]
    weights, remembered = scan.gated(
        cache, reader, _padded(cache, q, span), attended.scores, versions, span
    )
    return _cut(attended.output(weights) + remembered, span), new


def _look_back(
    cache: HierarchicalCache,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: Span,
    old: CacheState,
    new: CacheState,
) -> Attended:
    """Score window and sinks, and put both into `new` as they are after the call."""
    turned_q, turned_k = cache.rotate(q, k, old.count)
    keys = torch.cat([recent.in_order(old.keys, old.count), turned_k], dim=2)
    values = torch.cat([recent.in_order(old.values, old.count), v], dim=2)
    new.keys = recent.from_order(keys, new.count, old.keys.shape[2])
    new.values = recent.from_order(values, new.count, old.values.shape[2])
    new.sink_keys, new.sink_values = _sinks(cache, k, v, span, old)
    scores = _window_scores(_padded(cache, turned_q * cache.scale, span), keys, span)
    scaled = _padded(cache, q, span) * cache.scale
    on_sinks = scaled @ new.sink_keys[:, :, None].transpose(-1, -2)
    index = torch.arange(1, new.sink_keys.shape[2] + 1, device=q.device)
    on_sinks = on_sinks.masked_fill((index > span.gone[..., None])[:, None, None], float("-inf"))
    scores = torch.cat([on_sinks, scores], dim=-1)
    return Attended(scores, new.sink_values, _windows(values, span))


def _padded(cache: HierarchicalCache, x: Tensor, span: Span) -> Tensor:
    """`[B, H, T, D]` -> `[B, Hkv, R, T', D]`."""
    return cache.by_key_head(F.pad(x, (0, 0, 0, span.padding)))


def _cut(x: Tensor, span: Span) -> Tensor:
    """`[B, Hkv, R, T', D]` -> `[B, H, T, D]`."""
    return x.flatten(1, 2)[:, :, : span.length]


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
