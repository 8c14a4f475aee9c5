"""The examples, run as a user runs them, with fewer steps."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from models import tiny_lm
from safetensors.torch import load_file

from ttt_cache.training.config_file import read_settings

EXAMPLES = Path(__file__).parents[1] / "examples"
YAMLS = sorted(path.name for path in EXAMPLES.glob("*.yaml"))


def run(cwd: Path, *command: object) -> str:
    words = [sys.executable, *(str(word) for word in command)]
    result = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def losses(printed: str) -> dict[str, float]:
    return {
        name: float(loss) for name, loss in re.findall(r"^(.+?) +loss ([\d.]+)$", printed, re.M)
    }


@pytest.mark.parametrize("name", YAMLS)
def test_every_yaml_is_one(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = yaml.safe_load((EXAMPLES / name).read_text())
    files = [*given["data"].values(), *given["moshi_paths"].values()]
    for file in (each for each in files if str(each).endswith((".jsonl", ".json", "rs", ".model"))):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    settings = read_settings(EXAMPLES / name)
    assert settings.ttt_cache.stages[0].train == "distill"
    assert settings.data.eval_data, "without it nothing is compared"


def test_there_is_a_yaml_for_a_cpu_and_two_for_moshi_7b() -> None:
    assert YAMLS == ["cpu.yaml", "moshi_7b_all_layers.yaml", "moshi_7b_top_layers.yaml"]


def test_the_loop_is_short_and_trains_the_memory(tmp_path: Path) -> None:
    script = EXAMPLES / "train_compressor.py"
    assert len(script.read_text().splitlines()) < 80
    found = losses(run(tmp_path, script, "--steps", 60))
    names = ["full context", "patched: a window of 6 to 13", "memory distilled"]
    full, window, distilled = (found[name] for name in names)
    assert full < window, "full context has something that the window has not"
    assert min(distilled, found["memory trained on the loss"]) < window - 0.3 * (window - full)
    assert (tmp_path / "out" / "my-adapter" / "adapter_model.safetensors").is_file()


def test_the_loop_takes_a_real_moshi_in_bfloat16(tmp_path: Path, monkeypatch, capsys) -> None:
    lm = tiny_lm(depformer_dim_feedforward=32).to(torch.bfloat16)
    info = SimpleNamespace(get_moshi=lambda device: lm)
    monkeypatch.setattr("moshi.models.loaders.CheckpointInfo.from_hf_repo", lambda name: info)
    monkeypatch.setattr(sys, "argv", ["train_compressor.py", "--hf-repo", "a/b", "--steps", "2"])
    monkeypatch.chdir(tmp_path)
    before = {name: p.clone() for name, p in lm.named_parameters()}
    runpy.run_path(str(EXAMPLES / "train_compressor.py"), run_name="__main__")
    assert len(losses(capsys.readouterr().out)) == 4
    assert all(torch.equal(p, before[n]) for n, p in lm.named_parameters() if n in before)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A folder in which examples/make_small.py was run."""
    folder = tmp_path_factory.mktemp("small")
    run(folder, EXAMPLES / "make_small.py")
    return folder


def test_the_cpu_yaml_trains_end_to_end(small: Path) -> None:
    given = yaml.safe_load((EXAMPLES / "cpu.yaml").read_text())
    for stage in given["ttt_cache"]["stages"]:
        stage["steps"] = 4 if stage["train"] != "everything" else 12
    (small / "cpu.yaml").write_text(yaml.safe_dump(given))
    printed = run(small, "-m", "ttt_cache.cli", "train", "cpu.yaml")
    lines = (small / "out/cpu/metrics.jsonl").read_text().splitlines()
    last = [line["loss"] for line in map(json.loads, lines) if line["stage"] == "everything"]
    assert len(last) == 12 and last[-1] < last[0]
    made = {path.name for path in (small / "out/cpu").iterdir()}
    assert {"adapter", "model.safetensors", "config.json", "metrics.jsonl", "training.png"} <= made
    assert {"summary.md", "tensorboard", "checkpoints", "codes", "settings.json"} <= made
    assert "memory reset" in printed and "before training" in printed


def test_the_small_recordings_become_many_different_codes(small: Path) -> None:
    """A codec of zeros would train all the same."""
    from moshi.models.loaders import CheckpointInfo

    read_clip = runpy.run_path(str(EXAMPLES / "make_small.py"))["read_clip"]
    folder = small / "out" / "small"
    info = CheckpointInfo.from_hf_repo(
        "none/needed", *(folder / n for n in ("model.safetensors", "mimi.safetensors")),
        tokenizer=folder / "tokenizer.model", config_path=folder / "config.json",
    )  # fmt: skip
    codes = info.get_mimi().encode(read_clip())
    assert codes.shape[1] == 2 and all(row.unique().numel() > 8 for row in codes[0])
    assert load_file(folder / "model.safetensors").keys() == info.get_moshi().state_dict().keys()
