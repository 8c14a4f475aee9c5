"""The parts of `benchmarks/gpu.py`, on the CPU and small: what needs a GPU stays untested here."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import TINY, tiny_lm

from ttt_cache import windowed
from ttt_cache.backend import VARIABLE
from ttt_cache.bench.core import Place, Widths
from ttt_cache.form import PLAIN
from ttt_cache.kernels import memory_reference, reference

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")
WIDTHS = Widths(64, 2)
SETTINGS = {"recent": 6, "virtual": 3, "chunk": 4}


@pytest.fixture(autouse=True)
def beside(monkeypatch):
    """Scripts import what stands beside them."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_kernels

    monkeypatch.setattr(gpu_kernels, "SETTINGS", SETTINGS)


def stepped(dtype=torch.float32):
    import gpu_kernels

    return gpu_kernels.stepped(Place(3, CPU, dtype, widths=WIDTHS), "reference", 21)


def as_kernel(token, ring, layer, virtual, workspace):
    return reference.decode(token, ring, layer, virtual)


def test_rows_are_in_different_phases():
    counts = stepped().state.count
    assert counts.tolist() == [18, 19, 20]  # 21 steps, of which some were not for everyone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_of_a_decode_kernel(dtype):
    import gpu_kernels

    core = stepped(dtype)
    assert 0 < gpu_kernels.decode_error(core, as_kernel) <= 0.5  # half: a budget is twice its loss

    def broken(*asked):
        recent, latent = as_kernel(*asked)
        recent[2, 1, 3] += 0.2
        return recent, latent

    assert gpu_kernels.decode_error(core, broken) > 1

    def nan(*asked):
        recent, latent = as_kernel(*asked)
        latent[0] = float("nan")
        return recent, latent

    found = gpu_kernels.decode_error(core, nan)
    assert found != found

    def forgets(token, ring, layer, virtual, workspace):
        keys = ring.keys.clone()
        out = as_kernel(token, ring, layer, virtual, workspace)
        ring.keys.copy_(keys)
        return out

    assert gpu_kernels.decode_error(core, forgets) > 1


def test_errors_of_a_memory_kernel():
    import gpu_kernels

    core = stepped()
    step = memory_reference.memory_step
    assert 0 < gpu_kernels.memory_error(core, step, 8) <= 0.5

    def broken(features, count, mask, weights, rows, chunk):
        step(features, count, mask, weights, rows, chunk)
        rows.last[1] *= 1.001

    assert gpu_kernels.memory_error(core, broken, 8) > 1


def test_bytes_are_those_of_the_derivation(monkeypatch):
    """`kernels/README.md` counts the token itself in the window; here it is not read there."""
    import gpu_kernels

    monkeypatch.setattr(gpu_kernels, "SETTINGS", {"recent": 100, "virtual": 10, "chunk": 8})
    core = gpu_kernels.stepped(Place(1, CPU, torch.bfloat16), "reference", 1)
    assert gpu_kernels.bytes_moved(gpu_kernels.ask(core)) == 1_788_544 - 16_384


def test_two_sessions_side_by_side():
    import gpu_graph

    one, other = gpu_graph.twins(tiny_lm, SETTINGS)
    assert gpu_graph.captured_is_eager(one, other, 48) == (0.0, True)


def test_sessions_that_differ_are_told():
    import gpu_graph

    one, other = gpu_graph.twins(tiny_lm, SETTINGS)
    with torch.no_grad():
        other.transformer.layers[1].self_attn.ttt_cache.reader.to_value.mul_(1.5)
    assert gpu_graph.captured_is_eager(one, other, 32)[0] > 1e-4


def test_frames_of_a_small_moshi():
    import gpu_frame

    lms = gpu_frame.models(CPU, torch.float32, SETTINGS, **TINY)
    stock, patched = (dict(lm.named_parameters()) for lm in lms.values())
    assert all(patched[name].data_ptr() == stock[name].data_ptr() for name in stock)
    for _ in range(2):  # conversations end, and others begin
        found = gpu_frame.measure(lms, 2, 4, 3, 14)
        assert found.keys() == {"stock", "patched"}
        for one in found.values():
            assert 0 < one["p50"] <= one["p99"] and one["frames"] == 12
    assert not any(lm.is_streaming for lm in lms.values())


def test_what_does_not_fit_leaves_nothing_behind(monkeypatch):
    import gpu_frame

    lms = gpu_frame.models(CPU, torch.float32, SETTINGS, **TINY)

    def full(state):
        raise torch.cuda.OutOfMemoryError

    with monkeypatch.context() as short:
        short.setattr(gpu_frame, "fill_ring", full)
        assert gpu_frame.measure(lms, 2, 4, 3, 14) == {}
    assert gpu_frame.measure({"patched": lms["patched"]}, 2, 4, 3, 14).keys() == {"patched"}


def test_conversations_in_real_time():
    import gpu_frame

    found = {64: {"p99": 30.0}, 512: {"p99": 79.9}, 1024: {"p99": 80.0}}
    assert gpu_frame.in_real_time(found) == 512
    assert gpu_frame.in_real_time({}) == 0


def test_errors_of_training_kernels(monkeypatch):
    """Plain PyTorch in their place: half of the budget at most."""
    import gpu_training

    assert 0 < gpu_training.kernel_error(CPU, torch.bfloat16, SETTINGS, 40, "reference") <= 0.5
    attend = windowed.attend
    broken = replace(PLAIN, attend=lambda *given: attend(*given) * 1.1)
    monkeypatch.setattr("ttt_cache.cache.parallel_form", chosen_as(broken))
    assert gpu_training.kernel_error(CPU, torch.bfloat16, SETTINGS, 40, "auto") > 1


def chosen_as(broken):
    """A choice of forms in which `auto` is a broken one."""
    return lambda *_: broken if os.environ[VARIABLE] == "auto" else PLAIN


def test_a_training_step_of_a_layer():
    import gpu_training

    pair = gpu_training.layers(CPU, torch.float32, SETTINGS, WIDTHS)
    found = gpu_training.measure(pair, 40, 6, torch.float32, 3, "reference")
    assert found["off"] <= 1e-5 and found["ms"].keys() == {"stock", "patched"}
    with torch.no_grad():
        pair["patched"].model.layers[0].norm1.alpha.mul_(1.1)
    with pytest.raises(SystemExit, match="is not stock's before its first eviction"):
        gpu_training.measure(pair, 40, 6, torch.float32, 3, "reference")


RATES = {"copy_bytes_per_second": 4e12, "matmul_operations_per_second": 7e14}


def test_what_was_not_measured_stays_open():
    import gpu_lines

    lines = gpu_lines.lines_of({"gpu": RATES})
    verdicts = {line.verdict for line in lines}
    assert verdicts == {"", "not measured"}
    assert sum(line.verdict == "not measured" for line in lines) == 15


def test_verdicts_of_a_run():
    import gpu_lines

    def frame(ms):
        return {"p50": ms, "p99": ms + 1, "mean": ms}

    def layer(patched):
        return {"ms": {"stock": 10.0, "patched": patched}, "peak_bytes": {"stock": 2, "patched": 1}}

    result = {
        "gpu": RATES,
        "errors": {"decode": 0.4, "memory": 1.0, "training": 0.5},
        "graph": {"off": 0.0, "allowed": 0.03, "captured_once": True},
        "decode": {batch: 3.1e12 if batch < 128 else 3.2e12 for batch in gpu_lines.BATCHES},
        "frame": {
            1: {"stock": frame(4.0), "patched": frame(3.6)},
            8: {"stock": frame(6.0), "patched": frame(4.0)},
            32: {"patched": frame(4.0)},
            1024: {"patched": frame(70.0)},
        },
        "conversations": {"stock": 8, "patched": 1024},
        "training": {3000: layer(9.5), 12000: layer(7.6)},
    }
    verdicts = {line.name: line.verdict for line in gpu_lines.lines_of(result)}
    assert verdicts["decode kernels: error beside float64"] == "met"
    assert verdicts["decode, batch 64"] == "MISSED" and verdicts["decode, batch 128"] == "met"
    assert verdicts["frame, batch 1: patched / stock"] == "met"
    assert verdicts["frame, batch 8: patched / stock"] == "MISSED"
    assert verdicts["frame, batch 32: patched / stock"] == "not measured"
    assert verdicts["conversations in real time: patched"] == "met"
    assert verdicts["training, 3000 frames: patched / stock"] == "met"
    assert verdicts["training, 12000 frames: patched / stock"] == "MISSED"


def test_without_a_gpu_it_says_what_it_needs(monkeypatch, capsys):
    import gpu

    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"needs an NVIDIA GPU .* got cpu.*ttt-cache bench"):
        gpu.main()
