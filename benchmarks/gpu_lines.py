"""What a run on a GPU must show, beside what it did; what was not measured stays open."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ttt_cache.evaluation.lines import Line

BATCHES = (1, 8, 16, 32, 64, 128, 256)  # of the decode kernel
LEAST_SHARE, FROM_BATCH = 0.80, 64  # of copy bandwidth
FRAME_AT_MOST = {1: 0.90, 8: 0.65, 32: 0.35, 64: 0.25}  # patched over stock
FLOORS = 0.92  # what is left at batch 1 of the bytes alone
REAL_TIME = (128, 256, 512, 1024, 1280, 1536)  # batch sizes of a patched model beyond stock's
CONVERSATIONS = 1000
LAYER_AT_MOST = {3000: 0.95, 12000: 0.75}

Result = dict[str, Any]


def lines_of(result: Result) -> list[Line]:
    """Every figure with its target, by what `gpu.py` has kept under the names of its parts."""
    parts = (_device, _errors, _graph, _decode, _frame, _training)
    return [line for part in parts for line in part(result)]


def _device(result: Result) -> Iterator[Line]:
    gpu = result["gpu"]
    yield Line("copy bandwidth", gpu["copy_bytes_per_second"] / 1e12, "TB/s")
    yield Line("matmul rate", gpu["matmul_operations_per_second"] / 1e12, "TFLOP/s")


def _errors(result: Result) -> Iterator[Line]:
    for name in ("decode", "memory", "training"):
        value = (result.get("errors") or {}).get(name)
        yield Line(f"{name} kernels: error beside float64", value, "of budget", at_most=1.0)


def _graph(result: Result) -> Iterator[Line]:
    found = result.get("graph") or {}
    name = "captured beside eager step"
    yield Line(name, found.get("off"), "of scale", at_most=found.get("allowed", 0.0))
    once = found.get("captured_once")
    yield Line("captures of a session", None if once is None else int(once), at_least=1, at_most=1)


def _decode(result: Result) -> Iterator[Line]:
    found, copy = result.get("decode") or {}, result["gpu"]["copy_bytes_per_second"]
    for batch in BATCHES:
        rate = found.get(batch)
        target = LEAST_SHARE if batch >= FROM_BATCH else None
        value = None if rate is None else rate / copy
        yield Line(f"decode, batch {batch}", value, "of copy bandwidth", at_least=target)


def _frame(result: Result) -> Iterator[Line]:
    found = result.get("frame") or {}
    for batch, target in FRAME_AT_MOST.items():
        both = found.get(batch) or {}
        for name, one in both.items():
            for part in ("p50", "p99", "mean"):
                yield Line(f"frame, batch {batch}: {name}, {part}", one[part], "ms")
        whole = both.keys() >= {"stock", "patched"}
        ratio = both["patched"]["mean"] / both["stock"]["mean"] if whole else None
        about = f"floors of bytes: {FLOORS}" if batch == 1 else ""
        name = f"frame, batch {batch}: patched / stock"
        yield Line(name, ratio, at_most=target, about=about)
    for batch, both in found.items():
        if batch not in FRAME_AT_MOST and "patched" in both:
            yield Line(f"frame, batch {batch}: patched, p99", both["patched"]["p99"], "ms")
    most = result.get("conversations") or {}
    for name, target in (("stock", None), ("patched", CONVERSATIONS)):
        line = f"conversations in real time: {name}"
        yield Line(line, most.get(name), "p99 below 80 ms", at_least=target)


def _training(result: Result) -> Iterator[Line]:
    found = result.get("training") or {}
    for length, target in LAYER_AT_MOST.items():
        one = found.get(length)
        name = f"training, {length} frames: patched / stock"
        if one is None:
            yield Line(name, None, at_most=target)
            continue
        for arm, ms in one["ms"].items():
            yield Line(f"training, {length} frames: {arm}", ms, "ms")
            peak = one["peak_bytes"][arm] / 1e9
            yield Line(f"training, {length} frames: {arm}, peak", peak, "GB")
        yield Line(name, one["ms"]["patched"] / one["ms"]["stock"], at_most=target)
