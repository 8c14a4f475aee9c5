"""What a run refuses before it trains."""

from __future__ import annotations

import json
import shutil

import pytest
from models import SMALL
from run_support import given, losses, refused
from safetensors.torch import load_file
from training_support import settings_of, write_checkpoint

from ttt_cache.training import checkpoint
from ttt_cache.training.engine import train

pytestmark = pytest.mark.usefixtures("tiny_mimi")


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
    stages = [{"train": "compressor", "frames": [60]}]
    changes = given(folder, codes_dir=None, patch=SMALL | {"recent": 40}, stages=stages)
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
