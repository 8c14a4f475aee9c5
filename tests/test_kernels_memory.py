"""The memory kernel: in Triton's interpreter, compiled for GPUs, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels_memory_support import Case, rows_of, weights_of
from kernels_support import CAPABILITIES, assert_fits, run_interpreted

from ttt_cache import CacheConfig, HierarchicalCache
from ttt_cache.kernels import memory_reference as reference
from ttt_cache.kernels.launch import Launch
from ttt_cache.kernels.memory_reference import MemoryRows, MemoryWeights
from ttt_cache.kernels.memory_step import memory_step, memory_step_launch
from ttt_cache.memory import TTT, Frames

SIZES: dict[str, Any] = {"memory_heads": 2, "memory_dim": 5, "hidden_dim": 7, "virtual": 3}
BUILT = {
    "default": Case(heads=4, d=64, n=128, slots=10, wait=100, chunk=8, dtype=torch.bfloat16),
    "most": Case(heads=4, d=128, n=256, slots=100, wait=100, chunk=8, dtype=torch.bfloat16),
    "odd": Case(heads=3, d=48, n=100, slots=10, wait=63, chunk=7, dtype=torch.float32),
    "linear": Case(heads=4, d=64, n=0, slots=10, wait=0, chunk=1, dtype=torch.float32),
}


def test_equals_its_reference_interpreted():
    run_interpreted("kernels_memory_cases.py", "-s")


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", BUILT)
def test_fits_a_gpu(name, capability):
    assert_fits(_launch(BUILT[name]), capability)


def test_the_reference_is_the_streaming_step_of_the_cache():
    torch.manual_seed(0)
    config = CacheConfig(recent=4, chunk=3, **SIZES)
    cache = HierarchicalCache(config, dim=8, num_heads=1, head_dim=4, dtype=torch.float64)
    for parameter in cache.parameters():
        torch.nn.init.normal_(parameter)
    assert isinstance(cache.memory, TTT)
    weights = weights_of(cache.memory)
    state, mine = cache.init_state(3), cache.init_state(3)
    for step in range(60):
        q, k, v = torch.randn(3, 3, 1, 1, 4, dtype=torch.float64)
        x, mask = torch.randn(3, 1, 8, dtype=torch.float64), torch.rand(3) < 0.8
        features = cache.memory.features(Frames(x, q, k, v, None))[:, 0].detach()
        cache.stream(q, k, v, x, state, mask)
        reference.memory_step(features, mine.count, mask, weights, rows_of(mine), 3)
        mine.count += mask
        if step == 30:
            for one in (state, mine):
                one.reset(torch.tensor([True, False, False]))
        for name in ("features", "readout", "memory.w1", "memory.grad1", "memory.w2"):
            own, theirs = (dict(one.tensors())[name] for one in (mine, state))
            torch.testing.assert_close(own, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": torch.float64}, "features must be one of"),
        ({"d": 8}, "memory_dim must be from 16 to 128"),
        ({"n": 512}, "hidden_dim from 16 to 256"),
    ],
)
def test_sizes_that_are_not_supported_are_named(change, said):
    with pytest.raises(ValueError, match=rf"{said}.*TTT_CACHE_BACKEND=reference"):
        _launch(Case(**change))


def test_tensors_that_do_not_fit_are_named():
    features, count, mask, weights, rows, chunk = _arguments(Case())
    with pytest.raises(ValueError, match="count must be"):
        memory_step_launch(features, count.int(), mask, weights, rows, chunk)
    with pytest.raises(ValueError, match="readout must be"):
        rest = rows._replace(readout=rows.readout[:, 1:])
        memory_step_launch(features, count, mask, weights, rest, chunk)
    with pytest.raises(ValueError, match=r"has all of .* or none"):
        rest = rows._replace(gradient=None)
        memory_step_launch(features, count, mask, weights, rest, chunk)


def test_needs_a_gpu():
    case = Case()
    features, mask = next(case.tokens())
    count = torch.zeros(case.batch, dtype=torch.long)
    with pytest.raises(ValueError, match=r"NVIDIA GPU, got cpu.*TTT_CACHE_BACKEND=reference"):
        memory_step(features, count, mask, case.weights(), case.rows(), case.chunk)


Arguments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, MemoryWeights, MemoryRows, int]


def _arguments(case: Case) -> Arguments:
    """What a launch is given, on no device."""
    with torch.device("meta"):
        weights, rows = case.weights(), case.rows()
        features = torch.empty(case.batch, rows.waiting.shape[-1], dtype=case.dtype)
        count = torch.empty(case.batch, dtype=torch.long)
        mask = torch.empty(case.batch, dtype=torch.bool)
    return features, count, mask, weights, rows, case.chunk


def _launch(case: Case) -> Launch:
    return memory_step_launch(*_arguments(case))
