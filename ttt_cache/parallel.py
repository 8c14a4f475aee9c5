"""The parallel form: many tokens at once, `(inputs, state) -> (outputs, state)`, differentiable.

What computes it, plain PyTorch or kernels, is a `Form`: attention over a window that moves along
(`ttt_cache.windowed`), and a scan of the memory over chunks (`ttt_cache.scan`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import recent, scan
from .form import Form
from .memory import TTT, Frames, QueryReader, VirtualTokens
from .span import Span
from .state import CacheState
from .windowed import Exact, joined

if TYPE_CHECKING:
    from .cache import HierarchicalCache


def extend(
    cache: HierarchicalCache,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor,
    state: CacheState | None,
    form: Form,
) -> tuple[Tensor, CacheState]:
    """Process T tokens of every row after `state` (`None`: empty).

    Args:
        q, k, v: before RoPE, `[B, H, T, D]` and `[B, Hkv, T, D]`.
        x: hidden states `[B, T, dim]`.
        form: what computes it.

    Returns:
        outputs `[B, H, T, D]` and the new state; `state` itself is unchanged.
    """
    span = Span.after(cache.window, None if state is None else state.count, q.shape[2], q.device)
    old = cache.empty(q.shape[0], device=k.device, dtype=k.dtype) if state is None else state
    new = replace(old, count=old.count + span.length)
    exact = output = None
    if cache.window.capacity:
        exact = _look_back(cache, q, k, v, span, old, new, form.turns_once(cache))
        if cache.needs_window_output:
            output = form.attend(cache, exact, None, span)
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
        found = scan.answers(cache, memory, features, queries, span, old, form)
        answers, new.readout, new.memory = found
        return cache.mix(reader.output(answers, q.dtype), output, q, span.tokens), new
    assert isinstance(reader, VirtualTokens) and exact is not None
    versions, new.readout, new.memory = scan.versions(cache, memory, features, span, old, form)
    return form.attend(cache, exact, versions, span), new


def _look_back(
    cache: HierarchicalCache,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: Span,
    old: CacheState,
    new: CacheState,
    turns_once: bool,
) -> Exact:
    """Lay out what may be seen exactly, and put it into `new` as it is after the call.

    Args:
        turns_once: whether new keys are handed on after RoPE.
    """
    capacity = cache.window.capacity
    old_keys = old_values = k.new_empty(*k.shape[:2], 0, k.shape[3])
    if span.history:
        old_keys = recent.in_order(old.keys, old.count)
        old_values = recent.in_order(old.values, old.count)
    new.sink_keys, new.sink_values = _sinks(cache, k, v, span, old)
    if turns_once:
        k = turned = cache.turn(k, old.count)
    else:  # the blocks turn their own keys; these are the ring's
        last = k[:, :, -capacity:]
        turned = cache.turn(last, old.count + (span.length - last.shape[2]))
    keys, values = _newest(old_keys, turned, capacity), _newest(old_values, v, capacity)
    new.keys = recent.from_order(keys, new.count, capacity)
    new.values = recent.from_order(values, new.count, capacity)
    return Exact(q, k, v, old_keys, old_values, new.sink_keys, new.sink_values)


def _newest(old: Tensor, new: Tensor, capacity: int) -> Tensor:
    """The last columns, as many as a ring has slots; zeros stand for those that do not exist."""
    columns = joined(old, new[:, :, -capacity:])[:, :, -capacity:]
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
