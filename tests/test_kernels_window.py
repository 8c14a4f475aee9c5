"""The training attention: its reference is the cache's parallel form, and it is its reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels_support import CAPABILITIES, assert_fits, run_interpreted
from kernels_window_calls import arguments, latents_of, launches, seen_of
from support import TOLERANCE, Case, assert_near

from ttt_cache import CacheConfig, CacheState, HierarchicalCache
from ttt_cache.kernels import window_reference as reference
from ttt_cache.kernels.inputs import GATES, Gate, Layer
from ttt_cache.kernels.window import windowed_attention
from ttt_cache.kernels.window_checks import check_window
from ttt_cache.kernels.window_inputs import Latents, Seen

SIZES: dict[str, Any] = {"chunk": 3, "virtual": 4, "memory_heads": 2, "memory_dim": 3}
SYSTEMS: dict[str, dict[str, Any]] = {
    **{gate: {"gate": gate, "alpha": 0.6} for gate in GATES},
    "sinks": {"sinks": 5},
    "slot": {"position": "slot"},
    "decay": {"position": "decay", "gate": "query"},
    "arrived": {"write": "arrived", "sinks": 2},
    "every token": {"chunk": 1},
    "window": {"memory": "none", "sinks": 2},
    "random": {"memory": "random"},
}
MOSHI: dict[str, Any] = {"heads": 32, "kv_heads": 32, "head_dim": 128, "tokens": 3000}
COMPILED: dict[str, dict[str, Any]] = {
    "Moshi": {},
    "another model": {"kv_heads": 8, "sinks": 4, "gate": "query", "history": 107},
    "float32": {
        **{"heads": 4, "kv_heads": 4, "head_dim": 80, "latent": 200},
        "dtype": torch.float32,
    },
}


def test_interpreted():
    run_interpreted("kernels_window_cases.py")


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name, capability):
    for launch in launches(**(MOSHI | COMPILED[name])):
        assert_fits(launch, capability)


@pytest.mark.parametrize("repeat", [1, 2])
@pytest.mark.parametrize("name", SYSTEMS)
def test_reference_is_the_parallel_form(name, repeat):
    """In float64, after nothing and after rows that are out of step; outputs and gradients."""
    settings = SIZES | {"recent": 5, "hidden_dim": 6} | SYSTEMS[name]
    case = Case(CacheConfig(**settings), num_heads=2 * repeat, kv_heads=2, seed=len(name))
    cache = case.build_stirred()
    compare(case, cache, cache.init_state(3))
    state = cache.init_state(3)
    for step in range(14):
        mask = torch.tensor([True, step % 4 > 0, step > 11])
        cache.stream(*case.tokens(3, 1), state, mask)
    compare(case, cache, state)


def compare(case: Case, cache: HierarchicalCache, state: CacheState) -> None:
    tokens = case.tokens(3, 19)
    given = [*(x.requires_grad_() for x in tokens), *cache.parameters()]
    expected, new = cache(*tokens, state)
    window = cache.window
    layer = Layer(window.recent, window.chunk, window.arrived)
    latents = latents_of(cache, tokens, state)
    found = reference.windowed_attention(seen_of(cache, tokens, state, new), layer, latents)
    assert_near(found, expected, TOLERANCE[case.dtype])
    back = torch.randn_like(expected)
    gradients = (
        torch.autograd.grad(
            y, given, back, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for y in (found, expected)
    )
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-9 * max(1, theirs.abs().max().item()))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dtype": torch.float64}, "dtype must be one of bfloat16, float16, float32"),
    ({"head_dim": 256}, "head_dim must be a multiple of 16 from 32 to 128, got 256"),
    ({"kv_heads": 5}, "q must have a multiple of 5 heads"),
    ({"tokens": 0}, "q must have from 1 to 0 tokens"),
    ({"gate": "soft"}, "gate must be one of joint, .*, got 'soft'"),
    ({"latent": 513}, "latents must be from 1 to 512 wide .*got 10 of 513; .*=reference"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_refusals(changes, said):
    with pytest.raises(ValueError, match=said):
        check_window(*arguments(**(MOSHI | {"tokens": 2} | changes)))


def test_shapes_are_checked():
    seen, layer, latents = arguments(**(MOSHI | {"tokens": 4}))
    check_window(seen, layer, latents)
    gaps = seen.q.new_empty(*seen.q.shape[:3], 256)[..., ::2]
    wrong: list[tuple[Seen, Latents | None, str]] = [
        (seen._replace(start=seen.start.int()), None, "start must be torch.int64"),
        (seen._replace(values=seen.values[:, :, 1:]), None, "values must be torch.bfloat16"),
        (seen._replace(turned_q=gaps), None, "turned_q must have no gaps"),
        (
            seen,
            latents._replace(readouts=latents.readouts.half()),
            "readouts must be torch.float32",
        ),
        (seen, latents._replace(to_key=latents.to_key[:, 1:]), "to_key must be"),
        (seen, latents._replace(gate=Gate("joint")), "needs one of shape .* as its bias"),
    ]
    for changed, of_memory, said in wrong:
        with pytest.raises(ValueError, match=said):
            check_window(changed, layer, of_memory)


def test_no_gpu_is_said():
    seen, layer, latents = arguments(2, 2, 32, 3, device="cpu")
    with pytest.raises(ValueError, match=r"NVIDIA GPU, got cpu; .*TTT_CACHE_BACKEND=reference"):
        windowed_attention(seen, layer, latents)
