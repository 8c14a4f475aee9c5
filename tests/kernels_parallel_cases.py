"""Calls of many tokens in kernels beside plain PyTorch; `test_backend.py` runs this interpreted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import Case, assert_near

from ttt_cache import CacheConfig, CacheState
from ttt_cache.backend import VARIABLE
from ttt_cache.fused_parallel import KERNELS

SMALL: dict[str, Any] = {
    **{"recent": 4, "chunk": 3, "virtual": 3, "sinks": 1},
    **{"memory_heads": 1, "memory_dim": 16, "hidden_dim": 16},
}
SIZES: dict[str, Any] = {"num_heads": 1, "kv_heads": 1, "head_dim": 32}
SYSTEMS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"memory": "ttt-linear", "gate": "query", "position": "slot", "sinks": 0},
    "arrived": {
        **{"write": "arrived", "gate": "residual", "source": "kv", "bptt": 1, "memory_heads": 2},
        **{"position": "slot", "virtual": 2},
    },
    "window": {"memory": "none"},
    "reset": {"reset_memory": True},
}


def outcome(case: Case, cache, tokens, split: int) -> list[torch.Tensor | None]:
    """Outputs, state and gradients of two calls, the second from rows out of step."""
    leaves = [z.clone().requires_grad_() for z in tokens]
    first, state = cache(*(z[..., :split, :] for z in leaves))
    second, state = cache(*(z[..., split:, :] for z in leaves), staggered(state))
    torch.manual_seed(0)
    y = torch.cat([first, second], dim=2)
    kept = [t for _, t in state.tensors() if t.requires_grad]
    loss = (y * torch.randn_like(y)).sum() + sum((t * torch.randn_like(t)).sum() for t in kept)
    weights = list(cache.parameters())
    found = torch.autograd.grad(loss, [*leaves, *weights], allow_unused=True)
    return [y, *(t for _, t in state.tensors()), *found]


def staggered(state: CacheState) -> CacheState:
    """The second row has not begun."""
    keep = torch.tensor([1, 0])
    return state.map(lambda t: t * keep.view(-1, *[1] * (t.dim() - 1)).to(t.dtype))


@pytest.mark.parametrize("name", SYSTEMS)
def test_calls(name, monkeypatch):
    sizes = dict(SIZES)
    if name == "arrived":  # two heads on each of two key heads, which go one after the other
        sizes |= {"num_heads": 4, "kv_heads": 2}
    case = Case(CacheConfig(**SMALL | SYSTEMS[name]), dtype=torch.float32, **sizes)
    cache = case.build_stirred()
    tokens = case.tokens(2, 17)
    found = {}
    for backend in ("reference", "triton"):
        monkeypatch.setenv(VARIABLE, backend)
        found[backend] = outcome(case, cache, tokens, 9)
    for mine, theirs in zip(found["triton"], found["reference"], strict=True):
        if mine is None or theirs is None:
            assert mine is theirs
            continue
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        if theirs.any():
            assert_near(mine.double(), theirs.double(), 3e-5)
        else:
            assert not mine.any()


def test_a_streaming_call_is_computed_as_its_state_has_chosen(monkeypatch):
    case = Case(CacheConfig(**SMALL), dtype=torch.float32, **SIZES)
    cache, calls = case.build_stirred(), []
    monkeypatch.setattr(
        "ttt_cache.fused_parallel.windowed_attention",
        lambda *given: calls.append(given) or torch.zeros_like(given[0].q),
    )
    monkeypatch.setenv(VARIABLE, "triton")
    state = cache.init_state(1)
    monkeypatch.setenv(VARIABLE, "reference")
    assert state.backend.form is KERNELS
    cache.stream(*case.tokens(1, 2), state)
    assert len(calls) == 1


def test_under_autocast(monkeypatch):
    """What is new is narrower than the state that it goes on from."""
    case = Case(CacheConfig(**SMALL), dtype=torch.float32, **SIZES)
    cache = case.build_stirred()
    tokens = case.tokens(1, 12)
    found = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv(VARIABLE, backend)
        _, state = cache(*(z[..., :9, :] for z in tokens))
        *heads, x = (z[..., 9:, :] for z in tokens)
        leaves = [z.bfloat16().requires_grad_() for z in heads]
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = cache(*leaves, x, state)
        found.append([y, *torch.autograd.grad(y.float().sum(), leaves)])
    for theirs, mine in zip(*found, strict=True):
        assert mine.dtype == theirs.dtype == torch.bfloat16
        assert_near(mine.float(), theirs.float(), 8 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chunk": 17}, "a chunk's tokens from 1 to 16, got 16, 16 and 17"),
        ({"memory_dim": 8}, "memory_dim must be from 16 to 128"),
        ({"memory_heads": 40}, "latents must be from 1 to 512 wide"),
    ],
)
def test_sizes_are_refused_before_they_count(changes, said, monkeypatch):
    """By a state and by a call of any length, not by the first that is long."""
    case = Case(CacheConfig(**SMALL | changes), dtype=torch.float32, **SIZES)
    cache = case.build()
    monkeypatch.setenv(VARIABLE, "triton")
    for refused in (lambda: cache.init_state(1), lambda: cache(*case.tokens(1, 2))):
        with pytest.raises(ValueError, match=f"triton cannot be had: .*{said}"):
            refused()


def test_gradients_of_gradients_are_refused(monkeypatch):
    case = Case(CacheConfig(**SMALL), dtype=torch.float32, **SIZES)
    cache = case.build_stirred()
    monkeypatch.setenv(VARIABLE, "triton")
    q, k, v, x = (z.requires_grad_() for z in case.tokens(1, 9))
    y, _ = cache(q, k, v, x)
    with pytest.raises(RuntimeError, match="gradients of gradients are not made"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_nothing_of_a_scan_outlives_the_call(monkeypatch):
    """What is kept for the way back does not grow by a version of the weights for every chunk."""
    settings = SMALL | {"memory_dim": 32, "hidden_dim": 128}  # many weights for a token's numbers
    case = Case(CacheConfig(**settings), dtype=torch.float32, **SIZES)
    cache = case.build_stirred()
    monkeypatch.setenv(VARIABLE, "triton")
    weights = sum(w.numel() for w in cache.memory.fast.layers.values())

    def kept(length: int) -> int:
        sizes: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 4
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            tokens = [z.requires_grad_() for z in case.tokens(1, length)]
            cache(*tokens)
        return sum(sizes.values())

    chunks = 4
    assert kept(10 + chunks * 3) - kept(10) < chunks * weights / 4
