"""The decode kernel: its reference is the cache's own step, and it is its reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels_support import CAPABILITIES, assert_fits, run_interpreted
from moshi.modules.rope import RotaryEmbedding
from support import TOLERANCE, Case, assert_near

from ttt_cache import CacheConfig, CacheState, HierarchicalCache
from ttt_cache.kernels import reference
from ttt_cache.kernels.decode import decode, decode_launch, outputs
from ttt_cache.kernels.inputs import GATES, Gate, Layer, Ring, Token, Virtual
from ttt_cache.kernels.rotary import frequencies
from ttt_cache.kernels.sizes import Split
from ttt_cache.kernels.workspace import Workspace
from ttt_cache.memory.tokens import LatentTokens

SIZES: dict[str, Any] = {"chunk": 3, "virtual": 4, "memory_heads": 2, "memory_dim": 3}
SYSTEMS: dict[str, dict[str, Any]] = {
    **{gate: {"gate": gate, "alpha": 0.6} for gate in GATES},
    "sinks": {"sinks": 5},
    "slot": {"position": "slot"},
    "decay": {"position": "decay", "gate": "query"},
    "arrived": {"write": "arrived", "sinks": 2},
    "window": {"memory": "none", "sinks": 2},
    "reset": {"reset_memory": True},
    "random": {"memory": "random"},
}
MOSHI: dict[str, Any] = {"heads": 32, "kv_heads": 32, "head_dim": 128, "recent": 100}
COMPILED: dict[str, dict[str, Any]] = {
    "Moshi at batch 64": {"batch": 64},
    "Moshi at batch 1": {"batch": 1, "sinks": 4, "gate": "query"},
    "another model": {
        **{"batch": 8, "kv_heads": 8, "head_dim": 64, "slots": 48, "recent": 3000},
        "dtype": torch.float32,
    },
}


def test_interpreted():
    run_interpreted("kernels_decode_cases.py")


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name, capability):
    assert_fits(launch(**(MOSHI | COMPILED[name])), capability)


@pytest.mark.parametrize("repeat", [1, 2])
@pytest.mark.parametrize("name", SYSTEMS)
def test_reference_is_the_step(name, repeat):
    """In float64, from the first token to well behind the first chunks, rows out of step."""
    settings = SIZES | {"recent": 5, "hidden_dim": 6} | SYSTEMS[name]
    case = Case(CacheConfig(**settings), num_heads=2 * repeat, kv_heads=2, seed=len(name))
    compare_steps(case, 10000.0 ** (-torch.arange(2, dtype=torch.float64) / 2), 0, 24)


@pytest.mark.parametrize("start", [0, 100_000])
def test_reference_turns_as_moshi_does(start):
    """With Moshi's own embedding in float32, also two hours into a conversation."""
    config = CacheConfig(recent=5, sinks=2, memory_dim=8, hidden_dim=12)
    case = Case(config, head_dim=32, dtype=torch.float32)
    assert isinstance(case.rope, RotaryEmbedding)
    compare_steps(case, frequencies(32, 10_000.0, "cpu"), start, 12)


def compare_steps(case: Case, turns: torch.Tensor, start: int, steps: int) -> None:
    cache, rows = case.build_stirred(), 3
    state = cache.init_state(rows)
    state.count.fill_(start)
    ring = ring_of(state.clone())
    window = cache.window
    layer = Layer(window.recent, window.chunk, window.arrived)
    for step in range(steps):
        q, k, v, x = case.tokens(rows, 1)
        mask = torch.tensor([True, step % 4 > 0, step % 3 > 0])
        y = cache.stream(q, k, v, x, state, mask)[mask]
        token = Token(q[:, :, 0], k[:, :, 0], v[:, :, 0], mask, turns)
        recent, latent = reference.decode(token, ring, layer, virtual_of(cache, q, state))
        if latent is not None:
            recent = recent + from_latent(cache, latent)
        assert_near(recent[mask], y[:, :, 0], TOLERANCE[case.dtype])
        for mine, theirs in zip(ring, ring_of(state), strict=True):
            assert torch.allclose(mine, theirs, rtol=0, atol=TOLERANCE[case.dtype])


def ring_of(state: CacheState) -> Ring:
    return Ring(state.count, state.keys, state.values, state.sink_keys, state.sink_values)


def virtual_of(cache: HierarchicalCache, q: torch.Tensor, state: CacheState) -> Virtual | None:
    """The virtual tokens that the step reads, `q` `[B, H, 1, D]` absorbed."""
    reader, gate = cache.reader, cache.gate
    if cache.config.reset_memory or gate is None or not isinstance(reader, LatentTokens):
        return None
    weight = torch.cat([reader.to_key, reader.slot_key], dim=-1)  # [Hkv, D, E + M]
    by_key = cache.by_key_head(q[:, :, 0] * cache.scale)
    absorbed = torch.einsum("bgrd,gdw->bgrw", by_key, weight).flatten(1, 2)
    if reader.position != "none":
        absorbed[..., -reader.slots :] += reader.bias()
    learned = {name: getattr(gate, name, None) for name in ("bias", "weight")}
    return Virtual(absorbed.detach(), state.readout, Gate(gate.kind, gate.alpha, **learned))


def from_latent(cache: HierarchicalCache, latent: torch.Tensor) -> torch.Tensor:
    assert isinstance(cache.reader, LatentTokens)
    by_key = cache.by_key_head(latent)
    return torch.einsum("bgre,ged->bgrd", by_key, cache.reader.to_value).flatten(1, 2).detach()


def launch(
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    recent: int,
    sinks: int = 0,
    slots: int = 10,
    gate: str = "joint",
    dtype: torch.dtype = torch.bfloat16,
):
    """A launch of these sizes on no device."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    layer = Layer(recent, 8)
    qkv = empty(batch, heads + 2 * kv_heads, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    token = Token(*qkv, empty(batch, dtype=torch.bool), frequencies(head_dim, 1e4, "meta"))
    slot, kept = (batch, kv_heads, layer.capacity, head_dim), (batch, kv_heads, sinks, head_dim)
    ring = Ring(
        empty(batch, dtype=torch.int64), empty(*slot), empty(*slot), empty(*kept), empty(*kept)
    )
    virtual = None
    if slots:
        weight = empty(heads, head_dim) if gate == "query" else None
        absorbed = empty(batch, heads, 256 + slots)
        readout = empty(batch, slots, 256, dtype=torch.float32)
        virtual = Virtual(absorbed, readout, Gate(gate, bias=empty(heads), weight=weight))
    space = Workspace.of(ring, heads, 256 if slots else 0)
    return decode_launch(token, ring, layer, virtual, space, outputs(token, virtual))


def test_split():
    """A split covers the ring, leaves no program without a slot, and follows from shapes."""
    assert Split.of(64 * 32, 107, 128, True).parts == 1
    assert Split.of(32, 107, 128, True) == Split(lanes=32, span=32, parts=5)
    for queries in (1, 7, 32, 255, 256):
        for capacity in (1, 31, 63, 100, 107, 3000, 8007):
            split = Split.of(queries, capacity, 96, False)
            assert split.span % split.lanes == 0
            assert (split.parts - 1) * split.span < capacity <= split.parts * split.span
            assert queries * (split.parts - 1) < 2 * 256


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": torch.float64}, "dtype must be one of bfloat16, float16, float32"),
        ({"head_dim": 256}, "head_dim must be a multiple of 16 from 32 to 128, got 256"),
        ({"kv_heads": 5}, "q must have a multiple of 5 heads"),
        ({"gate": "soft"}, "gate must be one of joint, .*, got 'soft'"),
    ],
)
def test_refusals(changes, said):
    with pytest.raises(ValueError, match=said):
        launch(**(MOSHI | {"batch": 2} | changes))


def test_no_gpu_is_said():
    one = torch.zeros(1, 1, 32)
    token = Token(one, one, one, torch.ones(1).bool(), None)
    ring = Ring(torch.zeros(1).long(), *torch.zeros(4, 1, 1, 3, 32))
    with pytest.raises(ValueError, match=r"NVIDIA GPU, got cpu; .*TTT_CACHE_BACKEND=reference"):
        decode(token, ring, Layer(3, 1), None, Workspace.of(ring, 1, 0))
