"""The parallel form: many tokens at once, `(inputs, state) -> (outputs, state)`, differentiable.

Queries are cut into blocks that attend to their own block and the window before it, so nothing is
T x T (`ttt_cache.blocks`). The memory is a scan over chunks (`ttt_cache.scan`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from . import reading, recent, scan
from .attention import softmax
from .blocks import blockwise
from .memory import TTT, Frames, QueryReader, VirtualTokens
from .product import last_product
from .span import BLOCK, Block, Span
from .state import CacheState

if TYPE_CHECKING:
    from .cache import HierarchicalCache


class Exact(NamedTuple):
    """What the queries of a call, or of a block, see exactly.

    Attributes:
        q, k, v: of new tokens, `[B, H, T, D]` and `[B, Hkv, T, D]`, before RoPE (`k`: after it if
            the call turns keys once).
        old_keys, old_values: of older tokens, `[B, Hkv, history, D]`, keys after RoPE.
        sink_keys, sink_values: `[B, Hkv, S, D]`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    old_keys: Tensor
    old_values: Tensor
    sink_keys: Tensor
    sink_values: Tensor

    @staticmethod
    def cut(block: Block) -> tuple[slice | None, ...]:
        return (block.queries, block.new, block.new, block.old, block.old, None, None)


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
    old = cache.empty(q.shape[0], device=k.device, dtype=k.dtype) if state is None else state
    new = replace(old, count=old.count + span.length)
    exact = output = None
    if cache.window.capacity:
        exact = _look_back(cache, q, k, v, span, old, new)
        if cache.needs_window_output:
            output = _attend_exactly(cache, exact, span)
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
        return cache.mix(reader.output(answers, q.dtype), output, q, span.tokens), new
    assert isinstance(reader, VirtualTokens) and exact is not None
    versions, new.readout, new.memory = scan.versions(cache, memory, features, span, old)
    return _attend(cache, exact, reading.pairs(versions, span), span), new


def _look_back(
    cache: HierarchicalCache,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: Span,
    old: CacheState,
    new: CacheState,
) -> Exact:
    """Lay out what may be seen exactly, and put it into `new` as it is after the call."""
    capacity = cache.window.capacity
    old_keys = old_values = k.new_empty(*k.shape[:2], 0, k.shape[3])
    if span.history:
        old_keys = recent.in_order(old.keys, old.count)
        old_values = recent.in_order(old.values, old.count)
    new.sink_keys, new.sink_values = _sinks(cache, k, v, span, old)
    if _turns_once(cache):
        k = turned = cache.turn(k, old.count)
    else:  # the blocks turn their own keys; these are the ring's
        last = k[:, :, -capacity:]
        turned = cache.turn(last, old.count + (span.length - last.shape[2]))
    keys, values = _newest(old_keys, turned, capacity), _newest(old_values, v, capacity)
    new.keys = recent.from_order(keys, new.count, capacity)
    new.values = recent.from_order(values, new.count, capacity)
    return Exact(q, k, v, old_keys, old_values, new.sink_keys, new.sink_values)


def _turns_once(cache: HierarchicalCache) -> bool:
    """Whether a call turns its keys before it is cut into blocks.

    A block that turns its own spares the call a copy of all keys; but each of them is turned again
    in every block that sees it, and in a wide window these are many.
    """
    return cache.window.capacity > 4 * BLOCK


def _newest(old: Tensor, new: Tensor, capacity: int) -> Tensor:
    """The last columns, as many as a ring has slots; zeros stand for those that do not exist."""
    columns = _joined(old, new[:, :, -capacity:])[:, :, -capacity:]
    return F.pad(columns, (0, 0, capacity - columns.shape[2], 0))


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
    key = cache.turn(key, distance)
    arrived = arrived[:, None, :, None]
    return torch.where(arrived, key, old.sink_keys), torch.where(arrived, value, old.sink_values)


def _attend_exactly(cache: HierarchicalCache, exact: Exact, span: Span) -> Tensor:
    """Attention to window and sinks alone, `[B, H, T, D]`."""

    def attend(block: Block, *parts: Tensor) -> Tensor:
        seen = Exact(*parts)
        return _output(cache, softmax(_scores(cache, seen, span, block)), seen).flatten(1, 2)

    return blockwise(attend, [(block, Exact.cut(block)) for block in span.blocks()], *exact)


def _attend(cache: HierarchicalCache, exact: Exact, readouts: Tensor, span: Span) -> Tensor:
    """Attention to window, sinks and virtual tokens, `[B, H, T, D]`."""
    module = reading.Reading(cache)
    weights = cache.weights("reader") | cache.weights("gate")

    def attend(block: Block, *parts: Tensor) -> Tensor:
        seen, readout, given = (
            Exact(*parts[:7]),
            parts[7],
            dict(zip(weights, parts[8:], strict=True)),
        )
        q, scores = cache.by_key_head(seen.q), _scores(cache, seen, span, block)
        shared = functional_call(module, given, (q, scores, readout, span, block))
        on_exact, remembered = shared
        return (_output(cache, on_exact, seen) + remembered).flatten(1, 2)

    whole = (None,) * len(weights)
    cuts = [(block, (*Exact.cut(block), block.groups, *whole)) for block in span.blocks()]
    return blockwise(attend, cuts, *exact, readouts, *weights.values())


def _scores(cache: HierarchicalCache, seen: Exact, span: Span, block: Block) -> Tensor:
    """Scores of a block over sinks, then window: `[B, Hkv, R, t, S + columns]`, -inf if hidden."""
    turned_q = cache.turn(seen.q, _position(span, block.queries, seen.q))
    keys = seen.k
    if not _turns_once(cache):
        keys = cache.turn(keys, _position(span, block.new, keys))
    keys = _joined(seen.old_keys, keys)
    scores = cache.by_key_head(turned_q) * cache.scale @ keys[:, :, None].transpose(-1, -2)
    scores = scores.masked_fill(span.hidden(block)[:, None, None], float("-inf"))
    if not cache.window.sinks:
        return scores
    q = cache.by_key_head(seen.q) * cache.scale
    on_sinks = q @ seen.sink_keys[:, :, None].transpose(-1, -2)
    hidden = span.hidden_sinks(block)[:, None, None]
    return torch.cat([on_sinks.masked_fill(hidden, float("-inf")), scores], dim=-1)


def _output(cache: HierarchicalCache, weights: Tensor, seen: Exact) -> Tensor:
    """Values of sinks and window weighted, `[B, Hkv, R, t, D]`."""
    values, rows, sinks = _joined(seen.old_values, seen.v), weights.shape[2:4], cache.window.sinks
    on_sinks, on_window = weights.flatten(2, 3).split([sinks, values.shape[2]], dim=-1)
    output = last_product(on_window, values)
    if sinks:
        output = output + last_product(on_sinks, seen.sink_values)
    return output.unflatten(2, rows)


def _position(span: Span, tokens: slice, like: Tensor) -> Tensor:
    """Where the first of some new tokens stands, `[B]`."""
    return (span.start + tokens.start).expand(like.shape[0])


def _joined(old: Tensor, new: Tensor) -> Tensor:
    """Columns of older tokens, if there are any, and of new ones."""
    return torch.cat([old, new], dim=2) if old.shape[2] else new
