"""The memory scan's kernels: in Triton's interpreter, compiled for GPUs, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from kernels_scan_support import Case, gradients, made, plain
from kernels_support import CAPABILITIES, assert_fits, run_interpreted

from ttt_cache.kernels import memory_scan_reference as reference
from ttt_cache.kernels.launch import Launch
from ttt_cache.kernels.memory_scan import memory_scan
from ttt_cache.kernels.memory_scan_inputs import By, check_scan
from ttt_cache.kernels.memory_scan_launch import back_launches, scan_launch

BUILT = {
    "default": Case(chunks=24, nets=32, tokens=8, d=64, n=128),
    "most": Case(chunks=24, nets=32, tokens=8, d=128, n=256),
    "odd": Case(chunks=5, nets=3, tokens=7, d=48, n=100),
    "linear": Case(chunks=24, nets=32, tokens=8, d=64, n=0),
}
KERNELS = ("scan", "again", "back", "tokens")


def test_equals_its_reference_interpreted():
    run_interpreted("kernels_scan_cases.py", "-s")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_fits_a_gpu(kernel, capability):
    assert_fits(_launches(BUILT["default"])[KERNELS.index(kernel)], capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", [name for name in BUILT if name != "default"])
def test_other_sizes_fit(name, capability):
    for launch in _launches(BUILT[name]):
        assert_fits(launch, capability)


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(chunks=4, tokens=6, d=5, n=7, closed=(1, 3)),
        Case(d=4, n=9, loud=True),
        Case(tokens=1, d=3, n=0),
        Case(tokens=5, d=6, n=0, loud=True, closed=(2,)),
        Case(tokens=16, alike=True),
    ],
)
def test_the_reference_is_the_scan_of_training(case):
    torch.manual_seed(0)
    scan = case.draw()
    by = gradients(scan)
    mine = made(reference.memory_scan, scan, by, torch.float64)
    theirs = made(plain, scan, by, torch.float64)
    assert mine.keys() == theirs.keys()
    for name, one in mine.items():
        size = theirs[name].abs().max().item()
        torch.testing.assert_close(one, theirs[name], rtol=0, atol=1e-11 * (1 + size))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"d": 8}, "memory_dim must be from 16 to 128"),
        ({"n": 512}, "hidden_dim from 16 to 256"),
        ({"tokens": 17}, "a chunk's tokens from 1 to 16"),
    ],
)
def test_sizes_that_are_not_supported_are_named(change, said):
    with pytest.raises(ValueError, match=rf"{said}.*TTT_CACHE_BACKEND=reference"):
        check_scan(Case(**change).draw())


def test_tensors_that_do_not_fit_are_named():
    scan = Case().draw()
    with pytest.raises(ValueError, match=r"k must be torch\.float32"):
        check_scan(scan._replace(k=scan.k.double()))
    with pytest.raises(ValueError, match=r"closes must be torch\.bool"):
        check_scan(scan._replace(closes=scan.closes[1:]))
    with pytest.raises(ValueError, match=r"has all of .* or none"):
        check_scan(scan._replace(total=None))
    with pytest.raises(ValueError, match="k must have a chunk at least"):
        check_scan(scan._replace(k=scan.k[:0]))


def test_needs_a_gpu():
    with pytest.raises(ValueError, match=r"NVIDIA GPU, got cpu.*TTT_CACHE_BACKEND=reference"):
        memory_scan(*Case().draw())


def _launches(case: Case) -> list[Launch]:
    """A scan's kernels, on no device."""
    with torch.device("meta"):
        scan = case.draw()
        forward, found = scan_launch(scan)
        by = By(found.firsts, found.lasts, scan.first, scan.last, found.total)
        return [forward, *back_launches(scan, found, by)[0]]
