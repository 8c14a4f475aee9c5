"""Peak memory of a training step of one attention core in kernels, counted without a GPU.

The cores, the inputs and the count are those of `training.py`; the patched core is computed by the
kernels' form, all of whose tensors are made on the CPU while its launches do nothing. So nothing is
right but the allocations, which follow from shapes alone. Stock's attention runs as it is, compiled
where Moshi compiles, which takes less memory than without (`training.py`); on a GPU its fused
attention makes a copy of the mask in 16 bits, which is not in the figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import training
from common import environment, publish
from peak import peak_bytes
from triton import knobs

from ttt_cache.bench.core import chosen
from ttt_cache.evaluation.lines import Line
from ttt_cache.kernels.launch import Launch

CASES = ((3000, 32), (12000, 4))  # frames, heads
DTYPES = ("bfloat16", "float32")
AT_MOST = 1.0  # of stock's


def measure(length: int, heads: int, dtype: torch.dtype) -> dict[str, Any]:
    """Bytes of each arm, and how many kernels the patched one would start."""
    arms = {name: training.Arm(training.SETTINGS[name], heads) for name in ("stock", "patched")}
    drawn = training.Inputs.draw(length, heads * training.WIDTH)
    inputs = training.Inputs(*(x.detach().to(dtype).requires_grad_(x.requires_grad) for x in drawn))
    for arm in arms.values():
        arm.attention.to(dtype)
    started: list[str] = []

    def skip(launch: Launch) -> None:
        started.append(launch.kernel.__name__)

    found = {"stock": peak_bytes(lambda: arms["stock"].train(inputs))}
    found["plain"] = peak_bytes(lambda: arms["patched"].train(inputs))
    # As in the interpreter no GPU is asked for.
    with (
        chosen("triton"),
        patch.object(Launch, "run", skip),
        patch.object(knobs.runtime, "interpret", True),
    ):
        found["kernels"] = peak_bytes(lambda: arms["patched"].train(inputs))
    case = {"frames": length, "heads": heads, "dtype": str(dtype).removeprefix("torch.")}
    return {**case, "peak_bytes": found, "launches": len(started)}


def lines_of(result: dict[str, Any]) -> list[Line]:
    case = f"{result['frames']} frames, {result['heads']} heads, {result['dtype']}"
    peaks = result["peak_bytes"]
    lines = [Line(f"{case}: {name}", peak / 1e6, "MB") for name, peak in peaks.items()]
    ratio = peaks["kernels"] / peaks["stock"]
    lines.append(Line(f"{case}: kernels / stock", ratio, at_most=AT_MOST))
    return [*lines, Line(f"{case}: Triton launches", result["launches"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/training_bytes.json"))
    options = parser.parse_args()
    record = environment(options.seed, ", ".join(DTYPES))
    torch.manual_seed(options.seed)
    results = [measure(*case, getattr(torch, dtype)) for case in CASES for dtype in DTYPES]
    lines = [line for result in results for line in lines_of(result)]
    publish(
        "training_bytes", options.out, record, {"arms": training.SETTINGS}, lines, results=results
    )


if __name__ == "__main__":
    main()
