"""Attention of a call to what is seen exactly and to virtual tokens, in plain PyTorch.

Queries are cut into blocks that attend to their own block and the window before it, so nothing is
T x T (`ttt_cache.blocks`). Blocks are small: what they make stays in a processor's cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from . import reading
from .attention import softmax
from .blocks import WHOLE, Part, blockwise, tokens
from .product import last_product
from .span import BLOCK, Block, Span

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
    def cut(block: Block) -> tuple[Part, ...]:
        new, old = tokens(block.new), tokens(block.old)
        return (tokens(block.queries), new, new, old, old, WHOLE, WHOLE)


def turns_once(cache: HierarchicalCache) -> bool:
    """Whether a call turns its keys before it is cut into blocks.

    A block that turns its own spares the call a copy of all keys; but each of them is turned again
    in every block that sees it, and in a wide window these are many.
    """
    return cache.window.capacity > 4 * BLOCK


def attend(cache: HierarchicalCache, exact: Exact, readouts: Tensor | None, span: Span) -> Tensor:
    """The outputs of a call, `[B, H, T, D]`.

    Args:
        readouts: of the memory version at the start of the call and of each after it, `[B, V, *]`;
            `None`: window and sinks alone.
    """
    if readouts is None:
        return _attend_exactly(cache, exact, span)
    return _attend_to_all(cache, exact, readouts, span)


def _attend_exactly(cache: HierarchicalCache, exact: Exact, span: Span) -> Tensor:
    """Attention to window and sinks alone, `[B, H, T, D]`."""

    def attend(block: Block, *parts: Tensor) -> Tensor:
        seen = Exact(*parts)
        return _output(cache, softmax(_scores(cache, seen, span, block)), seen).flatten(1, 2)

    return blockwise(attend, [(block, Exact.cut(block)) for block in span.blocks()], *exact)


def _attend_to_all(cache: HierarchicalCache, exact: Exact, readouts: Tensor, span: Span) -> Tensor:
    """Attention to window, sinks and virtual tokens, `[B, H, T, D]`."""
    readouts = reading.pairs(readouts, span)
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

    whole = (WHOLE,) * len(weights)
    cuts = [(block, (*Exact.cut(block), tokens(block.groups), *whole)) for block in span.blocks()]
    return blockwise(attend, cuts, *exact, readouts, *weights.values())


def _scores(cache: HierarchicalCache, seen: Exact, span: Span, block: Block) -> Tensor:
    """Scores of a block over sinks, then window: `[B, Hkv, R, t, S + columns]`, -inf if hidden."""
    turned_q = cache.turn(seen.q, _position(span, block.queries, seen.q))
    keys = seen.k
    if not turns_once(cache):
        keys = cache.turn(keys, _position(span, block.new, keys))
    keys = joined(seen.old_keys, keys)
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
    values, rows, sinks = joined(seen.old_values, seen.v), weights.shape[2:4], cache.window.sinks
    on_sinks, on_window = weights.flatten(2, 3).split([sinks, values.shape[2]], dim=-1)
    output = last_product(on_window, values)
    if sinks:
        output = output + last_product(on_sinks, seen.sink_values)
    return output.unflatten(2, rows)


def _position(span: Span, tokens: slice, like: Tensor) -> Tensor:
    """Where the first of some new tokens stands, `[B]`."""
    return (span.start + tokens.start).expand(like.shape[0])


def joined(old: Tensor, new: Tensor) -> Tensor:
    """Columns of older tokens, if there are any, and of new ones."""
    return torch.cat([old, new], dim=2) if old.shape[2] else new
