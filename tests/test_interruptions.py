"""Runs that break off: what is left, what is said, and that nothing is missing when they go on."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from data_support import write_data_set
from run_support import given, losses, trained
from safetensors import SafetensorError
from training_support import settings_of

from ttt_cache.training import checkpoint, metrics, recorder, stage
from ttt_cache.training.engine import Run, train

pytestmark = pytest.mark.usefixtures("tiny_mimi")


def failing(step: int, what: type[BaseException] | None, monkeypatch) -> None:
    """Let the training of a step (from 1) fail: raise, or give a loss that is not a number."""
    calls, real = [], stage.fine_tune

    def fine_tune(*args):
        calls.append(None)
        losses, observed = real(*args)
        if len(calls) == step and what is not None:
            raise what
        if len(calls) == step:
            losses["loss"] = torch.tensor(float("nan"))
        return losses, observed

    monkeypatch.setattr(stage, "fine_tune", fine_tune)


@pytest.mark.parametrize(
    ("what", "error"), [(None, RuntimeError), (KeyboardInterrupt, KeyboardInterrupt)]
)
def test_finished_steps_are_never_lost(folder, done, monkeypatch, what, error):
    name = f"broken off {error.__name__}"
    settings = settings_of(folder, name, **(given(folder) | {"ckpt_freq": 0}))
    with monkeypatch.context() as patch:
        failing(3, what, patch)
        with pytest.raises(error) as caught:
            train(settings)
    if what is None:
        assert "step 3: loss is nan" in str(caught.value)
        advised = folder / name / "checkpoints" / "step_000002" / "adapter"
        assert f"in another run_dir with ttt_cache.adapter: {advised}" in str(caught.value)
        changes = given(folder, adapter=str(advised), patch={}) | {"max_steps": 1}
        train(settings_of(folder, "advised", **changes, optim={"lr": 1e-3}))
    assert [p.name for p in checkpoint.checkpoints(folder / name)] == ["step_000002"]
    train(settings)
    assert losses(folder / name) == losses(done)


@pytest.mark.parametrize("file", ["carry-0.safetensors", "weights.safetensors", "optimizer.pt"])
def test_a_full_disk_leaves_the_checkpoints_before(folder, done, monkeypatch, file):
    name = f"full {file}"
    settings = settings_of(folder, name, **given(folder))
    with monkeypatch.context() as patch:
        for module, writer in ((checkpoint, "save_file"), (torch, "save")):
            patch.setattr(module, writer, _full(getattr(module, writer), file))
        with pytest.raises(OSError, match=file.replace(".", r"\.")) as caught:
            train(settings)
    assert "step_000002" in str(caught.value)
    found = [path.name for path in (folder / name / "checkpoints").iterdir()]
    assert found == ["step_000001"]
    train(settings)
    assert losses(folder / name) == losses(done)


def _full(write: Any, file: str) -> Any:
    """A writer that finds the disk full at a file of the second checkpoint, half way through."""

    def half(tensors: Any, path: Path) -> None:
        write(tensors, path)
        if path.name == file and "step_000002" in path.parent.name:
            path.write_bytes(path.read_bytes()[:50])
            if write is torch.save:
                raise RuntimeError("PytorchStreamWriter failed writing file")
            raise SafetensorError(f"I/O error: No space left on device (os error {errno.ENOSPC})")

    return half


@pytest.fixture(scope="module")
def evaluated(folder) -> dict[str, Any]:
    """Settings of a run that evaluates after every step."""
    write_data_set(folder / "held_out", [60_000])
    data = {"train_data": "data", "eval_data": "held_out"}
    data = {name: str(folder / where / "data.jsonl") for name, where in data.items()}
    return given(folder) | {"data": data, "do_eval": True, "eval_freq": 1, "ckpt_freq": 0}


@pytest.fixture(scope="module")
def all_lines(folder, evaluated) -> list[dict[str, Any]]:
    return losses(trained(folder, "all lines", **evaluated))


def breaks(monkeypatch, owner: Any, name: str, call: int, what: BaseException, after: bool) -> None:
    """Let a call (from 1) of a function break off, before or after it has done its work."""
    calls, real = [], getattr(owner, name)

    def function(*args: Any, **settings: Any) -> Any:
        calls.append(None)
        if len(calls) == call and not after:
            raise what
        result = real(*args, **settings)
        if len(calls) == call:
            raise what
        return result

    monkeypatch.setattr(owner, name, function)


FULL = OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("owner", "name", "call", "what"),
    [
        (recorder, "append", 5, FULL),  # the figures of step 3
        (recorder, "append", 4, FULL),  # the evaluation of step 2
        (Run, "evaluate", 3, KeyboardInterrupt()),  # of step 2: the first one is before training
        (stage.StageRun, "_save", 1, KeyboardInterrupt()),  # the last one
        (checkpoint, "_remove_all_but", 1, KeyboardInterrupt()),  # in it
    ],
)
def test_no_line_is_missing_and_none_is_there_twice(
    folder, evaluated, all_lines, monkeypatch, owner, name, call, what, after
):
    run = f"{name} {call} {after}"
    settings = settings_of(folder, run, **evaluated)
    with monkeypatch.context() as patch:
        breaks(patch, owner, name, call, what, after)
        with pytest.raises(type(what)):
            train(settings)
    assert checkpoint.checkpoints(folder / run)
    train(settings)
    assert losses(folder / run) == all_lines


def test_evaluations_may_stop_and_change_no_step(folder, evaluated, all_lines):
    run_dir = trained(folder, "fewer lines", **evaluated | {"ckpt_freq": 1})
    shutil.rmtree(run_dir / "checkpoints" / "step_000003")
    trained(folder, "fewer lines", **evaluated | {"do_eval": False, "eval_freq": 7})
    assert losses(run_dir) == all_lines[:-1]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(folder, monkeypatch):
    synced: set[Path] = set()
    real, rename, seen = os.fsync, Path.rename, []

    def fsync(handle: int) -> None:
        synced.add(Path(os.readlink(f"/proc/self/fd/{handle}")))
        real(handle)

    def named(path: Path, target: Path) -> Path:
        if target.name == "step_000001":
            inside = set(path.rglob("*"))
            assert len(inside) == 7 and inside | {path} <= synced
            assert target.parents[1] / metrics.NAME in synced
            seen.append(target)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", named)
    trained(folder, "synced", max_steps=1)
    assert len(seen) == 1 and seen[0].parent in synced
