"""A short run in a folder, and what is in the folder then."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from models import SMALL
from training_support import settings_of, use_tiny_mimi

from ttt_cache.training.engine import train
from ttt_cache.training.metrics import read_metrics

TIMES = ("seconds", "tokens_per_second")


def given(folder: Path, **cache: Any) -> dict[str, Any]:
    """Three steps with a checkpoint of each; keys of `cache` replace its block `ttt_cache:`."""
    block = {"patch": SMALL | {"layers": [0, 2]}, "codes_dir": str(folder / "codes")}
    stages = {"stages": [{"train": "compressor", "frames": [16]}]}
    return {"max_steps": 3, "ckpt_freq": 1, "ttt_cache": block | stages | cache}


def contents(run_dir: Path) -> dict[Path, bytes]:
    """Every file but the lock."""
    files = (path for path in run_dir.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: path.read_bytes() for path in files}


def losses(run_dir: Path) -> list[dict[str, Any]]:
    """Every line of figures but for what a clock measured."""
    records = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def trained(folder: Path, name: str, **changes: Any) -> Path:
    """A run that is done."""
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_mimi(patch)
        return train(settings_of(folder, name, **(given(folder) | changes)))


def half_of(done: Path, name: str) -> Path:
    """A copy of a run as if it had been killed after its second checkpoint."""
    run_dir = done.with_name(name)
    shutil.copytree(done, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_000003")
    return run_dir


def refused(folder: Path, name: str, *words: str, **changes: Any) -> None:
    """Check that a run is refused, in these words."""
    with pytest.raises((ValueError, FileNotFoundError, RuntimeError)) as caught:
        train(settings_of(folder, name, **(given(folder) | changes)))
    said = str(caught.value)
    assert all(word in said for word in words), said
