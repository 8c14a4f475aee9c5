"""Which code answers the steps: chosen once, said, and never another in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels_support import run_interpreted
from models import SMALL, tiny_lm
from support import rope64

import ttt_cache
from ttt_cache import CacheConfig, HierarchicalCache
from ttt_cache.backend import VARIABLE

SIZES: dict[str, Any] = {"dim": 32, "num_heads": 1, "head_dim": 32}


def test_steps_in_kernels_are_the_steps():
    run_interpreted("kernels_step_cases.py")


def test_calls_of_many_tokens_in_kernels_are_the_calls():
    run_interpreted("kernels_parallel_cases.py")


def test_auto_is_the_reference(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    chosen = HierarchicalCache(CacheConfig(), **SIZES).init_state(2).backend
    assert str(chosen) == "reference: TTT_CACHE_BACKEND=auto"


def test_the_choice_is_made_with_the_state(monkeypatch):
    cache = HierarchicalCache(CacheConfig(), **SIZES)
    monkeypatch.setenv(VARIABLE, "reference")
    state = cache.init_state(1)
    assert state.backend.reason == "TTT_CACHE_BACKEND=reference"
    monkeypatch.setenv(VARIABLE, "triton")
    assert state.clone().backend.name == "reference"
    with pytest.raises(ValueError, match="TTT_CACHE_BACKEND=triton cannot be had"):
        cache.init_state(1)


@pytest.mark.parametrize(
    ("settings", "sizes", "said"),
    [
        ({"memory": "mean"}, {}, "for ttt-mlp, ttt-linear and none, not for 'mean'"),
        ({"read": "query"}, {}, "for read='virtual', not for 'query'"),
        ({"source": "output"}, {}, "for the sources hidden and kv, not for 'output'"),
        ({"depth": 3}, {}, "for depth=2, not for 3"),
        ({}, {"rope": rope64}, "for Moshi's RotaryEmbedding, not for .*rope64"),
        ({}, {}, "device must be an NVIDIA GPU, got cpu"),
    ],
)
def test_triton_is_refused_where_it_cannot_be_had(settings, sizes, said, monkeypatch):
    cache = HierarchicalCache(CacheConfig(**settings), **(SIZES | sizes))
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(ValueError, match=f"TTT_CACHE_BACKEND=triton cannot be had: .*{said}"):
        cache.init_state(1)


def test_an_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "cuda")
    cache = HierarchicalCache(CacheConfig(), **SIZES)
    with pytest.raises(ValueError, match="must be one of auto, reference, triton, got 'cuda'"):
        cache.init_state(1)


def test_an_empty_variable_is_none(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")
    chosen = HierarchicalCache(CacheConfig(), **SIZES).init_state(1).backend
    assert str(chosen) == "reference: TTT_CACHE_BACKEND=auto"


def test_calls_of_many_tokens_choose_likewise(monkeypatch):
    """Without a state by the variable, streaming as the state has chosen."""
    cache = HierarchicalCache(CacheConfig(recent=4), **SIZES)
    tokens = (*torch.randn(3, 1, 1, 6, 32), torch.randn(1, 6, 32))
    monkeypatch.delenv(VARIABLE, raising=False)
    state = cache.init_state(1)
    monkeypatch.setenv(VARIABLE, "triton")
    with pytest.raises(ValueError, match=r"triton cannot be had: .*got cpu"):
        cache(*tokens)
    assert cache.stream(*tokens, state).isfinite().all()


def test_the_report_says_which(monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, "reference")
    model = tiny_lm()
    ttt_cache.patch(model, layers=[0, 2], **SMALL)
    backends = [row.backend for row in ttt_cache.report(model).layers]
    assert [one and one.name for one in backends] == ["reference", None, "reference"]
    printed = capsys.readouterr().out
    assert "steps by" in printed and "reference: TTT_CACHE_BACKEND=reference" in printed
