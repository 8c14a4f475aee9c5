"""A tiny training run: checkpoint, data and YAML in the real formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState
from data_support import tiny_mimi, tiny_tokenizer, write_data_set
from models import SMALL, TINY, random_codes, tiny_lm
from moshi.models.loaders import CheckpointInfo
from safetensors.torch import save_file

from ttt_cache.training.config_file import read_settings
from ttt_cache.training.engine import Run
from ttt_cache.training.metrics import read_metrics
from ttt_cache.training.settings import Settings

LORA = {"lora": {"enable": True, "rank": 2}}
FULL = {"full_finetuning": True}
LENGTHS = [96_000, 60_000, 130_000, 80_000]  # samples of 24 kHz: 50, 31.25, 67.7 and 41.7 frames


def write_checkpoint(folder: Path, **changes: Any) -> dict[str, str]:
    """A Moshi in its own file formats; returns `moshi_paths`. Its Mimi is never loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tiny_lm(**changes).state_dict(), folder / "model.safetensors")
    config = TINY | changes | {"moshi_name": "model.safetensors", "model_type": "moshi"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mimi.safetensors").touch()
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer().serialized_model_proto())
    return {
        "hf_repo_id": "local/only",
        "moshi_path": str(folder / "model.safetensors"),
        "mimi_path": str(folder / "mimi.safetensors"),
        "tokenizer_path": str(folder / "tokenizer.model"),
        "config_path": str(folder / "config.json"),
    }


def write_run(folder: Path, name: str = "run", **changes: Any) -> Path:
    """A YAML whose files exist; keys of `changes` replace its own."""
    if not (folder / "data").exists():
        write_data_set(folder / "data", LENGTHS)
        write_checkpoint(folder / "model")
    paths = {n: str(folder / "model" / f) for n, f in FILES.items()}
    given: dict[str, Any] = {
        "data": {"train_data": str(folder / "data" / "data.jsonl")},
        "moshi_paths": {"hf_repo_id": "local/only"} | paths,
        "run_dir": str(folder / name),
        "param_dtype": "float32",
        "batch_size": 2,
        "max_steps": 4,
        "optim": {"lr": 1e-2},
        "ttt_cache": {
            "patch": SMALL | {"layers": [0, 2]},
            "codes_dir": str(folder / "codes"),
            "stages": [{"train": "compressor", "frames": [16]}],
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(given | changes))
    return path


FILES = {
    "moshi_path": "model.safetensors",
    "mimi_path": "mimi.safetensors",
    "tokenizer_path": "tokenizer.model",
    "config_path": "config.json",
}


def use_tiny_mimi(monkeypatch) -> None:
    """Mimi's real weights are not to be had: let the checkpoint's be a tiny random one."""
    monkeypatch.setattr(
        "moshi.models.loaders.CheckpointInfo.get_mimi", lambda *_, **__: tiny_mimi()
    )


def settings_of(folder: Path, name: str = "run", **changes: Any) -> Settings:
    return read_settings(write_run(folder, name, **changes))


@pytest.fixture(autouse=True)
def small_and_alone(monkeypatch) -> None:
    """Runs load a narrow Mimi, and know nothing of another's precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    use_tiny_mimi(monkeypatch)


def make(folder: Path, name: str, *stages: dict, cache: dict | None = None, **changes) -> Run:
    block = {"patch": SMALL | {"layers": [0, 2]}, "codes_dir": str(folder / "codes")}
    block |= {"stages": stages or [{"train": "compressor"}]} | (cache or {})
    given = {"max_steps": 2, "duration_sec": 1.28} | changes
    return Run(settings_of(folder, name, ttt_cache=block, **given))


def figures(folder: Path, name: str) -> list[dict]:
    return read_metrics(folder / name / "metrics.jsonl")


def base(folder: Path, **files: Path) -> CheckpointInfo:
    """The checkpoint that runs begin with, some of its files replaced."""
    paths = {name: folder / "model" / file for name, file in FILES.items()} | files
    return CheckpointInfo.from_hf_repo(
        "local/only",
        moshi_weights=paths["moshi_path"],
        mimi_weights=paths["mimi_path"],
        tokenizer=paths["tokenizer_path"],
        config_path=paths["config_path"],
        lora_weights=paths.get("lora_path"),
    )


__all__ = ["random_codes", "settings_of", "use_tiny_mimi", "write_checkpoint", "write_run"]
