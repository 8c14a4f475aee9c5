"""The streaming step in Triton kernels and matrix products: at most six launches for a layer.

Computes what `step.py` does. Whether it can is for `backend.py` to say, when a state is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from moshi.modules.rope import RotaryEmbedding
from torch import Tensor

from .kernels.decode import decode, decode_launch, outputs
from .kernels.inputs import Gate, Layer, Ring, Token, Virtual
from .kernels.memory_reference import MemoryRows, MemoryWeights
from .kernels.memory_step import memory_step, memory_step_launch
from .kernels.rotary import frequencies
from .kernels.workspace import Workspace
from .memory import TTT, Frames
from .memory.tokens import LatentTokens

if TYPE_CHECKING:
    from .cache import HierarchicalCache
    from .state import CacheState


@dataclass(frozen=True)
class Fused:
    """What the kernels need beside a state; nothing in it lasts from one step to the next.

    Attributes:
        workspace: where programs meet.
        frequencies: of Moshi's RoPE, `[D / 2]`; `None` without.
    """

    workspace: Workspace
    frequencies: Tensor | None

    @classmethod
    def of(cls, cache: HierarchicalCache, state: CacheState) -> Fused:
        """For one state of the cache."""
        turns = None
        if isinstance(cache.rope, RotaryEmbedding):
            turns = frequencies(cache.head_dim, cache.rope.max_period, state.keys.device)
        reader = reader_of(cache)
        latent_dim = 0 if reader is None else reader.to_value.shape[1]
        return cls(Workspace.of(ring_of(state), cache.num_heads, latent_dim), turns)

    def step(
        self,
        cache: HierarchicalCache,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        state: CacheState,
        mask: Tensor,
    ) -> Tensor:
        """As `ttt_cache.step.step`."""
        asked = q.dtype
        # Under autocast they may be narrower than the ring, in whose dtype the kernel reads all.
        q, k, v = (z.to(state.keys.dtype) for z in (q, k, v))
        if isinstance(cache.memory, TTT):
            features = cache.memory.features(Frames(x, q, k, v, None))[:, 0]
            memory_step(features, state.count, mask, *memory_of(cache, cache.memory, state))
        token = Token(_packed(q), _packed(k), _packed(v), mask, self.frequencies)
        reader, virtual = reader_of(cache), None
        if reader is not None:
            virtual = Virtual(absorbed(reader, token.q), state.readout, gate_of(cache))
        recent, latent = decode(token, ring_of(state), layer_of(cache), virtual, self.workspace)
        if reader is not None and latent is not None:
            add_values(reader, recent, latent)
        return recent.unsqueeze(2).to(asked)


def rehearse(cache: HierarchicalCache, state: CacheState, fused: Fused) -> None:
    """Prepare the launches of a step and start none.

    Raises:
        ValueError: a kernel cannot do it; the message says why.
    """
    rows = len(state.count)
    q = state.keys.new_empty(rows, cache.num_heads, cache.head_dim)
    k = state.keys.new_empty(rows, cache.kv_heads, cache.head_dim)
    token = Token(q, k, k, torch.empty_like(state.count, dtype=torch.bool), fused.frequencies)
    reader, virtual = reader_of(cache), None
    if reader is not None:
        made = q.new_empty(*q.shape[:2], reader.to_value.shape[1] + reader.slots)
        virtual = Virtual(made, state.readout, gate_of(cache))
    out = outputs(token, virtual)
    decode_launch(token, ring_of(state), layer_of(cache), virtual, fused.workspace, out)
    if isinstance(cache.memory, TTT):
        features = state.features.new_empty(rows, cache.memory.width)
        memory_step_launch(
            features, state.count, token.mask, *memory_of(cache, cache.memory, state)
        )


def absorbed(reader: LatentTokens, q: Tensor) -> Tensor:
    """What read-outs and slots are scored with: q `[B, H, D]` before RoPE -> `[B, H, E + M]`."""
    kv_heads, _, latent_dim = reader.to_key.shape
    made = q.new_empty(*q.shape[:2], latent_dim + reader.slots)
    bias = None if reader.position == "none" else reader.bias().to(q.dtype)
    repeat = q.shape[1] // kv_heads
    for one in range(repeat):
        heads = slice(one, None, repeat)  # one of each key head: views, where groups would copy
        by_head, found = q[:, heads].transpose(0, 1), made[:, heads].transpose(0, 1)
        on_latents, on_slots = found.split([latent_dim, reader.slots], dim=-1)
        on_latents.baddbmm_(by_head, reader.to_key.to(q.dtype), beta=0, alpha=reader.scale)
        start, kept = (on_slots, 0) if bias is None else (bias[heads, None], 1)
        slot_key = reader.slot_key.to(q.dtype)
        torch.baddbmm(start, by_head, slot_key, beta=kept, alpha=reader.scale, out=on_slots)
    return made


def add_values(reader: LatentTokens, recent: Tensor, latent: Tensor) -> None:
    """Add `W_V latent` to `recent`, `[B, H, E]` and `[B, H, D]`, in place."""
    to_value = reader.to_value.to(recent.dtype)
    repeat = recent.shape[1] // len(to_value)
    for one in range(repeat):
        heads = slice(one, None, repeat)
        recent[:, heads].transpose(0, 1).baddbmm_(latent[:, heads].transpose(0, 1), to_value)


def reader_of(cache: HierarchicalCache) -> LatentTokens | None:
    """The reader, where a memory is read at all."""
    if cache.config.reset_memory or not isinstance(cache.reader, LatentTokens):
        return None
    return cache.reader


def ring_of(state: CacheState) -> Ring:
    return Ring(state.count, state.keys, state.values, state.sink_keys, state.sink_values)


def layer_of(cache: HierarchicalCache) -> Layer:
    window = cache.window
    interleave = getattr(cache.rope, "interleave", True)
    return Layer(window.recent, window.chunk, window.arrived, interleave)


def gate_of(cache: HierarchicalCache) -> Gate:
    gate = cache.gate
    assert gate is not None
    learned = {name: getattr(gate, name, None) for name in ("bias", "weight")}
    return Gate(gate.kind, gate.alpha, **learned)


def memory_of(
    cache: HierarchicalCache, memory: TTT, state: CacheState
) -> tuple[MemoryWeights, MemoryRows, int]:
    fast, linear = memory.fast, not memory.fast.hidden
    weights = MemoryWeights(
        rate=memory.rate,
        slots=memory.slot_query,
        first=None if linear else fast.layers["w1"],
        last=fast.layers[fast.last],
        step_size=None if linear else fast.step_size,
    )
    rows = MemoryRows(
        waiting=state.features,
        first=None if linear else state.memory["w1"],
        gradient=None if linear else state.memory["grad1"],
        last=state.memory[fast.last],
        readout=state.readout,
    )
    return weights, rows, cache.window.chunk


def _packed(x: Tensor) -> Tensor:
    """`[B, H, 1, D]` as `[B, H, D]` without gaps between a row's heads; copied if there are any."""
    one = x[:, :, 0]
    return one if one[0].is_contiguous() else one.contiguous()
