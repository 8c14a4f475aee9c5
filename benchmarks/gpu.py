"""All that a GPU must show, in one run of under ten minutes: `python benchmarks/gpu.py`.

In bfloat16, on weights drawn at random. First what the device can do (copies, products), then
whether its kernels are right (against float64, and a captured step against an eager one); wrong
ones end the run. Then speeds: the decode kernel's share of copy bandwidth, whole frames of Moshi
7B, conversations in real time, a layer's training step. One JSON file keeps all of it, written
after each part; a part that the time does not reach is left open.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_frame
import gpu_graph
import gpu_kernels
import gpu_training
import torch
from common import environment, publish
from gpu_lines import BATCHES, FRAME_AT_MOST, LAYER_AT_MOST, REAL_TIME, lines_of
from moshi.models.loaders import get_moshi_lm
from rich.console import Console

from ttt_cache.bench.check import ALLOWED
from ttt_cache.bench.core import Place
from ttt_cache.bench.device import facts, triton_missing
from ttt_cache.bench.timing import Cold

DTYPE = torch.bfloat16
SETTINGS = gpu_kernels.SETTINGS
RECENT, CHUNK = SETTINGS["recent"], SETTINGS["chunk"]
FILLED = RECENT + 3 * CHUNK  # frames after which a memory has been written and published
MINUTES = 9.0  # no part begins later
SMALL = {"num_layers": 2, "depformer_num_layers": 1}  # for what does not depend on depth
Result = dict[Any, Any]  # by name, or by batch size or length


@torch.no_grad()
def errors(device: torch.device, _: Result) -> Result:
    """Of the kernels, as shares of their budgets."""
    from ttt_cache.kernels.decode import decode
    from ttt_cache.kernels.memory_step import memory_step

    core = gpu_kernels.stepped(Place(3, device, DTYPE), "triton", FILLED)
    found = {
        "decode": gpu_kernels.decode_error(core, decode),
        "memory": gpu_kernels.memory_error(core, memory_step, 2 * CHUNK),
        "training": training_error(device),
    }
    for name, share in found.items():
        if not share <= 1:
            raise SystemExit(
                f"the {name} kernels are {share:.3g} times their budget off; no speeds"
            )
    return found


@torch.enable_grad()
def training_error(device: torch.device) -> float:
    return gpu_training.kernel_error(device, DTYPE, SETTINGS, 5 * FILLED)


@torch.no_grad()
def graph(device: torch.device, _: Result) -> Result:
    """A captured session beside an eager one."""

    def make() -> Any:
        return get_moshi_lm(None, device=device, dtype=DTYPE, lm_kwargs_overrides=SMALL).eval()

    pair, allowed = gpu_graph.twins(make, SETTINGS), ALLOWED[DTYPE]
    off, once = gpu_graph.captured_is_eager(*pair, steps=8 * RECENT)
    if not (off <= allowed and once):
        raise SystemExit(
            f"a captured step is not the eager one: off by {off:.3g} of the scale, allowed "
            f"{allowed:.3g}; captured once: {once}; no speeds"
        )
    return {"off": off, "allowed": allowed, "captured_once": once}


@torch.no_grad()
def decode(device: torch.device, _: Result) -> Result:
    """Bytes a second of the decode kernel, by batch size."""
    from ttt_cache.kernels.decode import decode

    cold, found = Cold(device), {}
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    for batch in BATCHES:
        core = gpu_kernels.stepped(Place(batch, device, DTYPE), "triton", FILLED)
        found[batch] = gpu_kernels.Layers(core, decode, l2).bytes_per_second(cold, CHUNK)
    return found


@torch.no_grad()
def frame(device: torch.device, result: Result) -> Result:
    """Whole frames: both models in turns, then as many conversations as stay in real time."""
    lms = gpu_frame.models(device, DTYPE, SETTINGS)
    alone, found = {"patched": lms["patched"]}, Result()
    for batch in (*FRAME_AT_MOST, *REAL_TIME):
        for chosen in (lms, alone) if batch in FRAME_AT_MOST else (alone,):
            found[batch] = gpu_frame.measure(chosen, batch, CHUNK, 20, FILLED)
            release()
            if found[batch]:
                break  # where both do not fit, the patched one may
        if found[batch].get("patched", {}).get("p99", 0.0) >= gpu_frame.REAL_TIME_MS:
            break
    result["conversations"] = {
        name: gpu_frame.in_real_time({n: b[name] for n, b in found.items() if name in b})
        for name in lms
    }
    return found


def training(device: torch.device, _: Result) -> Result:
    """A layer's training step, by frames of the recording."""
    pair = gpu_training.layers(device, DTYPE, SETTINGS)
    return {n: gpu_training.measure(pair, n, RECENT, DTYPE, 11) for n in LAYER_AT_MOST}


PARTS: dict[str, Callable[[torch.device, Result], Result]] = {
    "errors": errors,
    "graph": graph,
    "decode": decode,
    "frame": frame,
    "training": training,
}


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def refuse(device: torch.device) -> None:
    """Raise `SystemExit` where there is no GPU that the kernels run on."""
    missing = triton_missing(device)
    if missing:
        raise SystemExit(
            f"benchmarks/gpu.py needs an NVIDIA GPU that the Triton kernels run on: {missing}. "
            "`ttt-cache bench` measures on a CPU too."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/gpu.json"))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refuse(device)
    torch.manual_seed(options.seed)
    began, console = time.monotonic(), Console(stderr=True)
    record = environment(options.seed, "bfloat16") | {"environment": {}}
    result: Result = {"gpu": facts(device, DTYPE), "seconds": {}}
    for name, part in PARTS.items():
        start = time.monotonic()
        if start - began < MINUTES * 60:
            with console.status(name):
                result[name] = part(device, result)
            release()
            result["seconds"][name] = time.monotonic() - start
        publish("gpu", options.out, record, {"arms": SETTINGS}, lines_of(result), **result)


if __name__ == "__main__":
    main()
