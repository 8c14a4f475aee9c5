"""Moshi's own files: what is damaged, or does not go together, is named by key and file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from moshi.models.loaders import CheckpointInfo
from training_support import write_checkpoint

from ttt_cache.training.pretrained import OfRun
from ttt_cache.training.settings import Paths

CPU = torch.device("cpu")


@pytest.fixture
def paths(tmp_path) -> dict[str, str]:
    return write_checkpoint(tmp_path / "model")


def refusal(paths: dict[str, str]) -> str:
    """What is said of a checkpoint, opened as a run opens it."""
    with pytest.raises(ValueError) as caught:
        files = OfRun.of(Paths(**paths))
        info = files.info()
        files.codec(info, CPU)
        files.language_model(info, CPU, torch.float32)
    said = str(caught.value)
    assert len(said) < 1000, "pages of names of weights"
    return said


def change_config(paths: dict[str, str], **changes: object) -> None:
    """Change keys of the config; `None` removes one."""
    path = Path(paths["config_path"])
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


@pytest.mark.parametrize("text", [b'{"dim": ', b"[]", b"\xff\xfe"])
def test_a_damaged_config(paths, text):
    Path(paths["config_path"]).write_bytes(text)
    assert refusal(paths).startswith(f"moshi_paths.config_path: {paths['config_path']}")


def test_a_config_that_says_too_little_or_leads_nowhere(paths, tmp_path):
    change_config(paths, dep_q=None)
    assert refusal(paths) == f"moshi_paths.config_path: {paths['config_path']}: dep_q is missing"
    mimi = tmp_path / "mimi.json"
    mimi.write_text("{")
    change_config(paths, dep_q=2, mimi_config_name=f"file://{mimi}")
    said = refusal(paths)
    assert "mimi_config_name" in said and paths["config_path"] in said


def test_a_damaged_tokenizer(paths):
    Path(paths["tokenizer_path"]).write_bytes(b"no model")
    assert refusal(paths).startswith(f"moshi_paths.tokenizer_path: {paths['tokenizer_path']} is")


@pytest.mark.parametrize("what", ["cut", "Moshi's"])
def test_a_mimi_that_is_damaged_or_none(paths, what):
    weights = Path(paths["moshi_path"]).read_bytes()
    Path(paths["mimi_path"]).write_bytes(weights if what == "Moshi's" else weights[:1000])
    assert refusal(paths).startswith(f"moshi_paths.mimi_path: {paths['mimi_path']} is damaged, or")


def test_lora_and_config_go_together(paths, tmp_path):
    lora = tmp_path / "lora.safetensors"
    lora.touch()
    said = refusal(paths | {"lora_path": str(lora)})
    assert "moshi_paths.config_path" in said and str(lora) in said
    change_config(paths, lora=True, lora_rank=2)
    said = refusal(paths)
    assert "moshi_paths.lora_path must be given" in said and paths["config_path"] in said


def test_models_that_say_nothing_cannot_be_trained(tmp_path):
    delays = [0, 0, 1, 0]
    files = OfRun.of(Paths(**write_checkpoint(tmp_path / "odd", n_q=3, delays=delays)))
    with pytest.raises(ValueError, match="moshi_paths: the model's n_q"):
        files.language_model(files.info(), CPU, torch.float32)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_a_shortage_of_memory_is_not_blamed_on_the_weights(paths, monkeypatch, error):
    def get_moshi(*_, **__):
        raise error

    monkeypatch.setattr(CheckpointInfo, "get_moshi", get_moshi)
    files = OfRun.of(Paths(**paths))
    with pytest.raises(type(error)) as caught:
        files.language_model(files.info(), CPU, torch.float32)
    assert caught.value is error
