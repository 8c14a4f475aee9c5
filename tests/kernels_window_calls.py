"""Calls of the training attention: as the cache's parallel form makes them, and on no device."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from support import Tokens

from ttt_cache import CacheState, HierarchicalCache, recent, scan
from ttt_cache.form import PLAIN
from ttt_cache.kernels import window_passes as passes
from ttt_cache.kernels.inputs import Gate, Layer
from ttt_cache.kernels.launch import Launch
from ttt_cache.kernels.window_inputs import Latents, Seen
from ttt_cache.memory import Frames
from ttt_cache.memory.tokens import LatentTokens
from ttt_cache.span import Span


def seen_of(cache: HierarchicalCache, tokens: Tokens, state: CacheState, new: CacheState) -> Seen:
    q, k, v, _ = tokens
    keys = recent.in_order(state.keys, state.count), cache.turn(k, state.count)
    values = recent.in_order(state.values, state.count), v
    return Seen(
        q,
        cache.turn(q, state.count),
        torch.cat(keys, dim=2),
        torch.cat(values, dim=2),
        new.sink_keys,
        new.sink_values,
        state.count,
    )


def latents_of(cache: HierarchicalCache, tokens: Tokens, state: CacheState) -> Latents | None:
    """What the parallel form reads: the versions of the call, and the weights of the reader."""
    reader, gate, memory = cache.reader, cache.gate, cache.memory
    if memory is None:
        return None
    assert isinstance(reader, LatentTokens) and gate is not None
    q, k, v, x = tokens
    features = memory.features(Frames(x, q, k, v, None))[:, None]
    features = torch.cat([recent.in_order(state.features, state.count), features], dim=2)
    span = Span.after(cache.window, state.count, tokens.length, q.device)
    versions, _, _ = scan.versions(cache, memory, features, span, state, PLAIN)
    bias = None if reader.position == "none" else reader.bias()
    learned = {name: getattr(gate, name, None) for name in ("bias", "weight")}
    weights = reader.to_key, reader.slot_key, reader.to_value, bias
    return Latents(versions, *weights, Gate(gate.kind, gate.alpha, **learned))


def arguments(
    heads: int,
    kv_heads: int,
    head_dim: int,
    tokens: int,
    sinks: int = 0,
    gate: str = "joint",
    latent: int = 256,
    history: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "meta",
) -> tuple[Seen, Layer, Latents]:
    """A call of these sizes on no device, with the default settings."""
    layer, slots = Layer(100, 8), 10

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def of_heads(number: int, length: int) -> torch.Tensor:
        return empty(1, length, number, head_dim).transpose(1, 2)

    seen = Seen(
        *(of_heads(heads, tokens) for _ in range(2)),
        *(of_heads(kv_heads, history + tokens) for _ in range(2)),
        *(of_heads(kv_heads, sinks) for _ in range(2)),
        empty(1, dtype=torch.int64),
    )
    weight = empty(heads, head_dim) if gate == "query" else None
    weights = (
        (kv_heads, head_dim, latent),
        (kv_heads, head_dim, slots),
        (kv_heads, latent, head_dim),
    )
    versions = max(tokens - layer.recent, 0) // layer.chunk + 1
    latents = Latents(
        empty(1, versions, slots, latent, dtype=torch.float32),
        *(empty(*shape) for shape in weights),
        empty(heads, slots) if gate == "query" else None,
        Gate(gate, bias=empty(heads), weight=weight),
    )
    return seen, layer, latents


def launches(**sizes: Any) -> list[Launch]:
    """All that a call of these sizes and its way back would start."""
    seen, layer, latents = arguments(**sizes)
    latents = latents._replace(readouts=latents.readouts.to(seen.q.dtype))
    found: list[Launch] = []
    with patch.object(Launch, "run", lambda launch: found.append(launch)):
        y, recent_y, lse = passes.forward(seen, layer, latents)
        names = frozenset(Seen._fields + Latents._fields)
        passes.backward(seen, layer, latents, recent_y, lse, y, names)
    return found
