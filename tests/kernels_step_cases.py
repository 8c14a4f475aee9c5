"""Whole steps in kernels against `step.py`; `test_backend.py` runs this in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import Case, Tokens, assert_near

from ttt_cache import CacheConfig

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


def states(cache, backend, monkeypatch):
    monkeypatch.setenv("TTT_CACHE_BACKEND", backend)
    return cache.init_state(2)
