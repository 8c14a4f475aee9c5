"""What a run refuses before it trains, and what is left when it breaks off."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SMALL
from safetensors import SafetensorError
from safetensors.torch import load_file
from training_support import settings_of, use_tiny_mimi, write_checkpoint, write_run

from ttt_cache.training import checkpoint, stage
from ttt_cache.training.engine import train
from ttt_cache.training.metrics import read_metrics

TIMES = ("seconds", "tokens_per_second")


@pytest.fixture(autouse=True)
def tiny_mimi(monkeypatch):
    use_tiny_mimi(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("refusals")
    write_run(folder)
    return folder


def given(folder: Path, **cache: Any) -> dict[str, Any]:
    block = {"patch": SMALL | {"layers": [0, 2]}, "codes_dir": str(folder / "codes")}
    stages = {"stages": [{"train": "compressor", "frames": [16]}]}
    return {"max_steps": 3, "ckpt_freq": 1, "ttt_cache": block | stages | cache}


def refused(folder: Path, name: str, *words: str, **changes: Any) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        train(settings_of(folder, name, **(given(folder) | changes)))
    said = str(caught.value)
    assert all(word in said for word in words), said


def contents(run_dir: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def losses(run_dir: Path) -> list[dict[str, Any]]:
    records = read_metrics(run_dir / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


@pytest.fixture(scope="module")
def done(folder) -> Path:
    """A run of three steps, with a checkpoint of each."""
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_mimi(patch)
        return train(settings_of(folder, "done", **given(folder)))


@pytest.fixture
def half(folder, done, request) -> Path:
    """A copy of it that was killed after its second checkpoint."""
    run_dir = folder / f"half {request.node.name}"
    shutil.copytree(done, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_000003")
    return run_dir


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"optim": {"lr": 0.02}}, "optim.lr is 0.02"),
        ({"seed": 1}, "seed is 1"),
        ({"batch_size": 3}, "rows is 3"),
        ({"max_steps": 9}, "max_steps is 9"),
    ],
)
def test_another_runs_folder_is_left_alone(folder, done, changes, key):
    before = contents(done)
    refused(folder, "done", key, str(done), "overwrite_run_dir", **changes)
    assert contents(done) == before


def test_a_folder_of_something_else_is_left_alone(folder):
    other = folder / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        refused(folder, "other", str(other), overwrite_run_dir=overwrite)
    assert [path.name for path in other.iterdir()] == ["thesis.txt"]


def test_a_run_is_overwritten_when_asked_to(folder, half):
    changes = given(folder) | {"max_steps": 1, "overwrite_run_dir": True, "ckpt_freq": 0}
    train(settings_of(folder, half.name, **changes))
    assert [record["step"] for record in losses(half)] == [1]
    assert [path.name for path in (half / "checkpoints").iterdir()] == ["step_000001"]


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        ({"patch": SMALL | {"layers": [7]}}, ["layers", "7"]),
        ({"patch": SMALL | {"recent": 100}}, ["recent", "100"]),
        ({"patch": {"memory": "none", "recent": 6}}, ["stages.0", "nothing to train"]),
        ({"stages": [{"train": "distill", "frames": [9]}]}, ["stages.0.frames", "9 frames"]),
        ({"adapter": "nowhere", "patch": {}}, ["nowhere"]),
    ],
)
def test_what_does_not_fit_can_be_mended_in_the_same_folder(folder, cache, words):
    name = f"mended {words[-1]}"
    refused(folder, name, *words, **given(folder, **cache))
    assert not (folder / name / "metrics.jsonl").exists()
    train(settings_of(folder, name, **given(folder)))
    assert len(losses(folder / name)) == 3


def test_sessions_that_never_leave_the_window(folder):
    short = folder / "short.jsonl"
    line = {"path": "data/wavs/1.wav", "duration": 2.5}
    short.write_text(json.dumps(line) + "\n")
    changes = given(folder, codes_dir=None, patch=SMALL | {"recent": 40})
    refused(folder, "short", "session_sec", "32 frames", **changes, data={"train_data": str(short)})


def test_damaged_weights_of_the_model_are_named(folder):
    weights = folder / "damaged.safetensors"
    weights.write_bytes((folder / "model" / "model.safetensors").read_bytes()[:-8])
    paths = write_checkpoint(folder / "model") | {"moshi_path": str(weights)}
    refused(folder, "damaged", "moshi_paths", str(weights), moshi_paths=paths)
    other = write_checkpoint(folder / "wider", dim=64)
    paths = write_checkpoint(folder / "model") | {"moshi_path": other["moshi_path"]}
    refused(folder, "wider run", "moshi_paths", other["moshi_path"], moshi_paths=paths)


def test_bad_data_is_named_with_file_and_field(folder):
    manifest = folder / "bad.jsonl"
    for text, words in (
        ("", ["bad.jsonl"]),
        ('{"path": "none.wav", "duration": 4.0}\n', ["bad.jsonl:1", "path", "none.wav"]),
        ('{"path": "data/wavs/0.wav"}\n', ["bad.jsonl:1", "duration"]),
    ):
        manifest.write_text(text)
        cache = given(folder, codes_dir=None)
        refused(folder, "bad", *words, **cache, data={"train_data": str(manifest)})


FILES_OF_A_CHECKPOINT = [
    "position.json",
    "weights.safetensors",
    "optimizer.pt",
    "carry-0.safetensors",
]


@pytest.mark.parametrize("damage", ["cut", "missing"])
@pytest.mark.parametrize("file", FILES_OF_A_CHECKPOINT)
def test_a_damaged_checkpoint_is_named(folder, done, half, file, damage):
    path = half / "checkpoints" / "step_000002" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if damage == "missing":
        path.unlink()
    refused(folder, half.name, str(path), "remove this checkpoint")
    shutil.rmtree(path.parent)
    train(settings_of(folder, half.name, **given(folder)))
    assert losses(half) == losses(done)


@pytest.mark.parametrize("file", FILES_OF_A_CHECKPOINT[:2])
def test_what_a_checkpoint_lacks_is_named(folder, half, file):
    path = half / "checkpoints" / "step_000002" / file
    if file == "position.json":
        position = json.loads(path.read_text())
        del position["stream"]
        path.write_text(json.dumps(position))
        refused(folder, half.name, str(path), "stream")
    else:
        tensors = load_file(path)
        checkpoint.save_file({k: v[..., :-1].contiguous() for k, v in tensors.items()}, path)
        refused(folder, half.name, str(path), "another model")


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
