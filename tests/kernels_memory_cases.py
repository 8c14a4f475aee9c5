"""The memory kernel against its reference; `test_kernels_memory.py` runs this interpreted.

Rows fall out of step with each other; all of the state is compared after every step, bit for bit
where a row stood still.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels_memory_support import Arms, Case, rows_of, weights_of
from torch import Tensor

from ttt_cache import CacheConfig, HierarchicalCache
from ttt_cache.kernels.memory_step import memory_step
from ttt_cache.memory import TTT, Frames

SIZES: dict[str, Any] = {"memory_heads": 2, "memory_dim": 16, "hidden_dim": 32, "virtual": 3}
CASES = {
    "default": Case(),
    "narrow": Case(d=16, n=16, slots=1, wait=1, chunk=1, steps=4),
    "odd": Case(heads=1, d=33, n=63, slots=17, wait=1, chunk=2, steps=6),
    "at once": Case(wait=0, chunk=2, steps=5),
    "linear": Case(n=0, d=40, slots=2),
    "linear at once": Case(n=0, slots=20, wait=0, chunk=1, steps=3),
    "capped": Case(heads=1, loud=True),
    "narrowed": Case(heads=1, kept=torch.float16, wait=1, chunk=2, steps=5),
    "tiles": Case(heads=1, d=64, n=128, slots=10, chunk=2, batch=2, steps=6),
    "most": Case(heads=1, d=128, n=256, slots=2, wait=0, chunk=2, batch=1, steps=3),
    "bfloat16": Case(heads=1, dtype=torch.bfloat16, steps=7),
    "float16": Case(heads=1, dtype=torch.float16, steps=7),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name):
    torch.manual_seed(0)
    case = CASES[name]
    arms = Arms(case)
    worst = max(arms.step(*token) for token in case.tokens())
    fed = arms.count - case.wait
    assert (fed >= case.chunk).any(), "no chunk has ended"
    print(f"{name}: errors up to {worst:.2f} of the budget")


def test_a_spoiled_row_spoils_no_other_and_a_reset_heals_it():
    torch.manual_seed(0)
    case = Case(heads=1, wait=1, chunk=2, batch=2)
    arms = Arms(case)
    everyone = torch.ones(2, dtype=torch.bool)
    for step, (features, _) in enumerate(case.tokens()):
        if step == 1:
            features[0, 5] = float("nan")
        if step == 5:
            assert arms.kernel.last[0].isnan().all(), "the row was to be spoiled"
            arms.reset(0)
        arms.step(features, everyone)
    for tensor in arms.kernel:
        assert tensor is not None and torch.isfinite(tensor).all()


def test_what_overflows_a_narrow_projection_is_large():
    torch.manual_seed(0)
    case = Case(heads=1, wait=0, chunk=1, dtype=torch.float16, batch=1)
    arms = Arms(case)
    features = torch.randn(1, 2 * case.d + 1).half()
    features[0, 3], features[0, case.d + 4] = float("inf"), -float("inf")
    arms.step(features, torch.ones(1, dtype=torch.bool))
    assert torch.isfinite(arms.kernel.last).all()


@pytest.mark.parametrize("memory", ["ttt-mlp", "ttt-linear"])
def test_equals_the_streaming_step_of_the_cache(memory):
    torch.manual_seed(0)
    config = CacheConfig(recent=2, chunk=2, memory=memory, **SIZES)
    cache = HierarchicalCache(config, dim=8, num_heads=1, head_dim=4)
    for parameter in cache.parameters():
        torch.nn.init.normal_(parameter)
    assert isinstance(cache.memory, TTT)
    state, mine = cache.init_state(2), cache.init_state(2)
    for _ in range(8):
        q, k, v = torch.randn(3, 2, 1, 1, 4)
        x, mask = torch.randn(2, 1, 8), torch.rand(2) < 0.8
        features = cache.memory.features(Frames(x, q, k, v, None))[:, 0].detach()
        cache.stream(q, k, v, x, state, mask)
        memory_step(features, mine.count, mask, weights_of(cache.memory), rows_of(mine), 2)
        mine.count += mask
        for name, theirs in state.tensors():
            if name == "readout" or name.startswith(("features", "memory")):
                own = dict(mine.tensors())[name]
                torch.testing.assert_close(own, theirs, rtol=0, atol=1e-5 * (1 + _size(theirs)))


def _size(tensor: Tensor) -> float:
    return tensor.abs().max().item()
