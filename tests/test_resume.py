"""Runs that are killed and go on, or run on two processes, against one that ran through."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from data_support import write_data_set
from models import SMALL
from safetensors.torch import load_file
from training_process import finish, start, start_two
from training_support import write_run

from ttt_cache.training.metrics import read_metrics

DATA = {"train_data": "data", "eval_data": "held_out"}
TIMES = ("seconds", "tokens_per_second")
STAGES = [
    {"train": "distill", "steps": 2, "frames": [16]},
    {
        "train": "compressor",
        "steps": 3,
        "frames": [4, 16, 16],
    },  # 4: nothing has left it
    {"train": "layers", "steps": 3, "frames": [8, 16, 16], "lr": 3e-3},
]


def settings(folder: Path, **cache: Any) -> dict[str, Any]:
    """A run with all that has to be carried across an interruption."""
    data = {n: str(folder / d / "data.jsonl") for n, d in DATA.items()}
    return {
        "data": data | {"shuffle": True},
        "batch_size": 2,
        "num_microbatches": 2,
        "do_eval": True,
        "eval_freq": 4,
        "ckpt_freq": 2,
        "lora": {"enable": True, "rank": 2},
        "ttt_cache": {
            "patch": SMALL | {"layers": [0, 2]},
            "codes_dir": str(folder / "codes"),
            "stages": STAGES,
            "distillation_weight": 0.5,
        }
        | cache,
    }


def losses(run_dir: Path) -> list[dict[str, Any]]:
    records = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def assert_same_run(run_dir: Path, reference: Path) -> None:
    """Bit for bit: figures, weights, and the page that sums them up."""
    assert losses(run_dir) == losses(reference)
    for name in ("adapter/adapter_model.safetensors", "lora.safetensors"):
        mine, theirs = load_file(run_dir / name), load_file(reference / name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
    pages = [(folder / "summary.md").read_text() for folder in (run_dir, reference)]
    assert pages[0].replace(f"run {run_dir.name}", f"run {reference.name}") == pages[1]


def assert_near(run_dir: Path, reference: Path) -> None:
    """Figures equal to 1e-5: sums are taken in another order. Gates are looked at in the first
    microbatch of the first process alone, which may have other rows."""
    mine, theirs = (
        [{k: v for k, v in r.items() if not k.startswith(("mass/", "ratio/"))} for r in losses(d)]
        for d in (run_dir, reference)
    )
    assert len(mine) == len(theirs)
    for record, other in zip(mine, theirs, strict=True):
        assert record.pop("stage") == other.pop("stage")
        assert record == pytest.approx(other, rel=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def reference(folder) -> Path:
    write_run(folder)  # makes data and model
    write_data_set(folder / "held_out", [30_000])
    finish(start(write_run(folder, "reference", **settings(folder))))
    assert [record["step"] for record in losses(folder / "reference")][-1] == 8
    return folder / "reference"


def lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_at_random_moments_it_goes_on_exactly(folder, reference):
    path, run_dir = write_run(folder, "killed", **settings(folder)), folder / "killed"
    moments = random.Random(0)
    for at_least in (2, 4, 7):
        process = start(path)
        while process.is_alive() and lines(run_dir) < at_least:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -9
    finish(start(path))
    assert_same_run(run_dir, reference)


@pytest.mark.parametrize("step", [4, 5])
def test_killed_while_it_writes_a_checkpoint(folder, reference, step):
    """Within a stage, and at its end."""
    name = f"torn{step}"
    path, run_dir = write_run(folder, name, **settings(folder)), folder / name
    process = start(path, slow=0.02)
    partial = run_dir / "checkpoints" / f".step_{step:06d}.partial"
    while process.is_alive() and not partial.exists():
        time.sleep(0.001)
    time.sleep(random.Random(step).uniform(0, 0.15))
    process.kill()
    process.join()
    assert process.exitcode == -9 and partial.exists()
    assert not (run_dir / "checkpoints" / f"step_{step:06d}").exists()
    finish(start(path))
    assert_same_run(run_dir, reference)
    assert not list((run_dir / "checkpoints").glob(".*"))


def test_a_finished_run_is_only_summed_up_again(folder, reference):
    again = folder / "again"
    shutil.copytree(reference, again)
    path = write_run(folder, "again", **settings(folder))
    (again / "summary.md").unlink()
    kept = {p: p.stat().st_mtime_ns for p in (again / "checkpoints").rglob("*")}
    finish(start(path))
    assert_same_run(again, reference)
    assert {p: p.stat().st_mtime_ns for p in (again / "checkpoints").rglob("*")} == kept


def test_one_batch_is_two_microbatches(folder, reference):
    changes = settings(folder) | {"batch_size": 4, "num_microbatches": 1}
    finish(start(write_run(folder, "batch", **changes)))
    assert_near(folder / "batch", reference)


def test_two_processes_are_one_with_twice_the_batch(folder, reference):
    changes = settings(folder) | {"num_microbatches": 1}
    finish(*start_two(write_run(folder, "two", **changes)))
    assert_near(folder / "two", reference)


def test_a_run_of_two_processes_goes_on_with_one(folder, reference):
    run_dir, changes = folder / "spread", settings(folder) | {"num_microbatches": 1}
    processes = start_two(write_run(folder, "spread", **changes))
    while all(p.is_alive() for p in processes) and lines(run_dir) < 6:
        time.sleep(0.002)
    for process in processes:
        process.kill()
        process.join()
    assert any((run_dir / "checkpoints").glob("step_*"))
    finish(start(write_run(folder, "spread", **changes | {"batch_size": 4})))
    assert_near(run_dir, reference)
