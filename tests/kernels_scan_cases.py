"""The memory scan against its reference; `test_kernels_scan.py` runs this interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_scan_support import Case, compare, gradients, made, plain

from ttt_cache.kernels.memory_scan import memory_scan

CASES = {
    "default": Case(),
    "one chunk": Case(chunks=1, nets=1, tokens=8),
    "one token": Case(tokens=1),
    "odd": Case(nets=1, tokens=7, d=33, n=50),
    "tiles": Case(chunks=2, nets=1, tokens=8, d=64, n=128),
    "long": Case(chunks=2, nets=1, tokens=16),
    "alike": Case(chunks=2, nets=1, tokens=16, alike=True),
    "linear": Case(n=0, d=20),
    "linear, capped": Case(n=0, tokens=5, loud=True),
    "capped": Case(nets=1, loud=True),
    "open": Case(nets=3, tokens=4, closed=(0, 1, 2)),
    "linear, open": Case(nets=2, n=0, tokens=4, closed=(1,)),
}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """NaN in all memory that is not filled: what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name):
    torch.manual_seed(0)
    assert torch.empty(3).isnan().all(), "new memory was to be NaN"
    shares = compare(memory_scan, CASES[name].draw())
    worst = max(shares, key=lambda name: shares[name])
    print(f"{name}: errors up to {shares[worst]:.2f} of the budget ({worst})")


@settings(max_examples=4)
@given(
    closed=st.lists(st.integers(0, 3), max_size=2),
    tokens=st.integers(1, 9),
    n=st.sampled_from([0, 16, 17]),
    d=st.integers(16, 18),
    seed=st.integers(0, 9999),
)
def test_equals_the_reference_for_any_pattern(closed, tokens, n, d, seed):
    torch.manual_seed(seed)
    compare(memory_scan, Case(3, 2, tokens, d, n, closed=tuple(closed)).draw())


def test_gaps_and_missing_gradients_are_no_matter():
    torch.manual_seed(0)
    scan = Case().draw()
    by = [None if z is None else torch.zeros_like(z) for z in gradients(scan)]
    by[3] = torch.randn_like(scan.last)  # the end alone is used
    apart = scan._replace(k=scan.k.transpose(0, 1).contiguous().transpose(0, 1))
    own = made(lambda *z: (*[None] * 3, memory_scan(*z)[3], None), apart, by, torch.float32)
    for name, theirs in made(plain, scan, by, torch.float32).items():
        if name.startswith("by"):
            torch.testing.assert_close(own[name], theirs, rtol=1e-4, atol=1e-6)


def test_a_spoiled_network_spoils_no_other():
    torch.manual_seed(0)
    scan = Case().draw()
    scan.v[1, 0, 0, 3] = float("nan")
    for found in made(memory_scan, scan, gradients(scan), torch.float32).values():
        other = found[:, 1] if found.dim() == 4 else found[1]
        assert torch.isfinite(other).all()
