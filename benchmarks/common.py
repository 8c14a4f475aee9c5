"""What the benchmarks share: a quiet process, where and with what it ran, JSON and table."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from moshi.modules.transformer import StreamingTransformer
from rich.console import Console

from ttt_cache.evaluation.lines import Line, table_of

DIM, HEADS = 4096, 32  # of Moshi 7B
CONTEXT = 3000  # frames in the ring of stock Moshi
QUIET = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "NO_TORCH_COMPILE": "1",
}


def quiet_process() -> None:
    """One thread that never spins, nothing compiled; starts the process anew where it must.

    The OpenMP runtime and Moshi's decorators read these variables while torch is imported, which
    has happened by the time this runs.
    """
    if any(os.environ.get(name) != value for name, value in QUIET.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **QUIET})
    torch.set_num_threads(1)


def transformer(
    dim: int, heads: int, layers: int, hidden: int, **factory: Any
) -> StreamingTransformer:
    """A temporal transformer as Moshi 7B has it, but for its size; `hidden`: feed-forward."""
    return StreamingTransformer(
        d_model=dim,
        num_heads=heads,
        num_layers=layers,
        dim_feedforward=hidden,
        causal=True,
        context=CONTEXT,
        positional_embedding="rope",
        gating="silu",
        norm="rms_norm_f32",
        **factory,
    ).eval()


def environment(seed: int, dtype: str) -> dict[str, Any]:
    """Command, date, versions and machine, for the record."""
    script = Path(sys.argv[0]).name
    return {
        "command": shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "device": _cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "moshi", "ttt-cache")},
        },
        "library": _library(),
        "environment": QUIET,
    }


def publish(
    title: str, out: Path, record: dict[str, Any], settings: Any, lines: list[Line], **details: Any
) -> None:
    """Print the figures as a table and write everything to `out`, whole or not at all."""
    Console(width=110).print(table_of(lines, title))
    rows = [line.as_json() for line in lines]
    result = {"benchmark": title, **record, "settings": settings, "figures": rows, **details}
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(out)


def _cpu() -> dict[str, Any]:
    name, info = platform.processor(), Path("/proc/cpuinfo")
    if info.exists():
        models = [row for row in info.read_text().splitlines() if row.startswith("model name")]
        name = models[0].split(":", 1)[1].strip() if models else name
    return {"cpu": name, "cores": os.cpu_count()}


def _library() -> dict[str, Any]:
    """The commit that last changed the package, and whether its files differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments, "--", "ttt_cache", "kernels"]
        root = Path(__file__).parents[1]
        return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip()

    return {
        "commit": git("log", "-1", "--format=%H"),
        "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
    }
