"""Whole steps in kernels against `step.py`; `test_backend.py` runs this in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import Case, Tokens, assert_near
from torch.utils._python_dispatch import TorchDispatchMode

from ttt_cache import CacheConfig
from ttt_cache.kernels.launch import Launch

SMALL: dict[str, Any] = {
    **{"recent": 3, "chunk": 2, "virtual": 3, "sinks": 1},
    **{"memory_heads": 1, "memory_dim": 16, "hidden_dim": 16},
}
SYSTEMS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"memory": "ttt-linear", "gate": "head", "position": "decay"},
    "arrived": {"write": "arrived", "gate": "residual", "source": "kv"},
    "window": {"memory": "none"},
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_steps(name, monkeypatch):
    """Rows out of step, and one begins anew; q, k and v as slices of longer tensors."""
    repeat = 1 if name == "default" else 2
    sizes = {"num_heads": repeat, "kv_heads": 1, "head_dim": 32}
    case = Case(CacheConfig(**SMALL | SYSTEMS[name]), dtype=torch.float32, **sizes)
    cache, rows = case.build_stirred(), 2
    plain = states(cache, "reference", monkeypatch)
    fused = states(cache, "triton", monkeypatch)
    assert (plain.backend.name, fused.backend.name) == ("reference", "triton")
    tokens: Tokens = case.tokens(rows, 8)
    for step in range(tokens.length):
        mask = torch.tensor([True, step not in (1, 2)])
        one = tokens.cut(step, step + 1)
        expected, found = (cache.stream(*one, state, mask) for state in (plain, fused))
        assert_near(found[mask], expected[mask], 1e-5)
        if step == 5:
            for state in (plain, fused):
                state.reset(torch.tensor([False, True]))
    for (_, mine), (_, theirs) in zip(fused.tensors(), plain.tensors(), strict=True):
        if mine.numel():
            assert_near(mine.double(), theirs.double(), 1e-5, scale=1.0)
    assert not fused.backend.fused.workspace.rows.any()


def test_a_step_under_autocast(monkeypatch):
    """q, k and v are narrower than the ring; the step answers in their dtype."""
    case = Case(CacheConfig(**SMALL), head_dim=32, dtype=torch.float32)
    cache, mask = case.build_stirred(), torch.ones(2, dtype=torch.bool)
    plain = states(cache, "reference", monkeypatch)
    fused = states(cache, "triton", monkeypatch)
    for _ in range(7):
        *heads, x = case.tokens(2, 1)
        narrow = [z.bfloat16() for z in heads]
        expected = cache.stream(*(z.float() for z in narrow), x, plain, mask)
        with torch.autocast("cpu", torch.bfloat16):
            found = cache.stream(*narrow, x, fused, mask)
        assert found.dtype == torch.bfloat16
        assert_near(found.float(), expected, 4 * torch.finfo(torch.bfloat16).eps)
    assert torch.equal(fused.values, plain.values)


class Started(TorchDispatchMode):
    """Writes down what a GPU would be asked to do: everything but views and allocations."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.log = log

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not views and not any(word in func.__name__ for word in ("view", "empty")):
            self.log.append(func.__name__)
        return made


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["mm", "memory_step_kernel", "baddbmm", "baddbmm", "decode_kernel", "baddbmm"]),
        ({"memory": "none"}, ["decode_kernel"]),
    ],
)
def test_launches_of_a_core(settings, expected, monkeypatch):
    """Six kernels and products for everything between the projections, and nothing beside them."""
    case = Case(CacheConfig(**SMALL | settings), head_dim=32, dtype=torch.float32)
    cache, log = case.build(), []
    state = states(cache, "triton", monkeypatch)
    monkeypatch.setattr(Launch, "run", lambda launch: log.append(launch.kernel.__name__))
    tokens, mask = case.tokens(2, 1), torch.ones(2, dtype=torch.bool)
    with Started(log):
        cache.stream(*tokens, state, mask)
    assert [name.split(".")[0].rstrip("_") for name in log] == expected


def states(cache, backend, monkeypatch):
    monkeypatch.setenv("TTT_CACHE_BACKEND", backend)
    return cache.init_state(2)
