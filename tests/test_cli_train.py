"""`ttt-cache train` and `distill`: what they run, refuse and say."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from training_support import use_tiny_mimi, write_run
from typer.testing import CliRunner, Result

from ttt_cache.cli import main
from ttt_cache.cli.distill import distillation_of
from ttt_cache.training.checkpoint import checkpoints
from ttt_cache.training.config_file import read_settings
from ttt_cache.training.settings import Stage

EVERY_STAGE = [
    {"train": "distill", "steps": 2, "frames": [16]},
    {"train": "compressor", "steps": 3, "frames": [16]},
]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def change(path: Path, **keys: object) -> None:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | keys))


def stages_of(run_dir: Path) -> list[str]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["stage"] for line in lines]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_tiny_mimi(monkeypatch)
    path = write_run(tmp_path)
    cache = yaml.safe_load(path.read_text())["ttt_cache"]
    change(path, ttt_cache=cache | {"stages": EVERY_STAGE})
    return path


def test_both_commands_train_one_yaml(config: Path, tmp_path: Path) -> None:
    for command, folder, stages in (
        ("train", "run", ["distill"] * 2 + ["compressor"] * 3),
        ("distill", "run-distill", ["distill"] * 2),
    ):
        result = call(command, config)
        assert result.exit_code == 0, result.output
        assert stages_of(tmp_path / folder) == stages
        assert (tmp_path / folder / "adapter" / "adapter_model.safetensors").is_file()


def test_distillation_of_a_run_without_it_takes_max_steps(tmp_path: Path) -> None:
    settings = read_settings(write_run(tmp_path))
    changed = distillation_of(settings)
    assert changed.ttt_cache.stages == [Stage(train="distill")]
    assert changed.steps_of(changed.ttt_cache.stages[0]) == settings.max_steps
    same = {"ttt_cache", "run_dir"}
    assert changed.model_dump(exclude=same) == settings.model_dump(exclude=same)
    assert changed.ttt_cache.patch == settings.ttt_cache.patch


@pytest.mark.parametrize(
    "keys, told",
    [
        ({"batch_sise": 3}, ["batch_sise: unknown key", "batch_size"]),
        ({"batch_size": 0, "optim": {"lr": -1}}, ["batch_size", "optim.lr"]),
        ({"data": {"train_data": "nowhere.jsonl"}}, ["data.train_data", "nowhere.jsonl"]),
        ({"moshi_paths": {"moshi_path": "gone.safetensors"}}, ["moshi_path", "gone.safetensors"]),
    ],
)
def test_a_wrong_yaml_is_told_and_nothing_is_made(
    config: Path, tmp_path: Path, keys: dict, told: list[str]
) -> None:
    change(config, **keys)
    result = call("train", config)
    assert result.exit_code == 2
    for words in told:
        assert words in result.stderr
    assert all(line.startswith(("ttt-cache: ", str(config))) for line in result.stderr.splitlines())
    assert not (tmp_path / "run").exists()


def test_another_run_in_the_folder_is_refused(config: Path) -> None:
    assert call("train", config).exit_code == 0
    change(config, optim={"lr": 1e-3})
    result = call("train", config)
    assert result.exit_code == 2
    assert "optim.lr" in result.stderr and "Traceback" not in result.output


def test_a_missing_yaml(tmp_path: Path) -> None:
    result = call("distill", tmp_path / "none.yaml")
    assert result.exit_code == 2 and "none.yaml does not exist" in result.stderr


def test_missing_packages_are_named_with_what_installs_them(config: Path, monkeypatch) -> None:
    module = sys.modules["ttt_cache.cli.train"]  # the name in the package is the command's
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "accelerate" else name)
    result = call("train", config)
    assert result.exit_code == 2
    assert result.stderr.strip() == (
        "ttt-cache: training needs accelerate: pip install 'ttt-cache[train]'"
    )


BLOCKED = """
import sys
for name in ("accelerate", "pydantic", "tensorboard"):
    sys.modules[name] = None  # importing it raises ImportError
import ttt_cache
from ttt_cache.cli import main
assert callable(ttt_cache.distill)
assert "ttt_cache.training.engine" not in sys.modules
"""


def test_the_library_does_not_need_the_extra() -> None:
    subprocess.run([sys.executable, "-c", BLOCKED], check=True, timeout=120)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_what_is_kept_and_goes_on(
    config: Path, tmp_path: Path, monkeypatch, number: int
) -> None:
    from ttt_cache.training.recorder import Recorder

    log = Recorder.log

    def interrupt(self, step: int, figures, stage: str) -> None:
        log(self, step, figures, stage)
        if step == 4:
            os.kill(os.getpid(), number)
            time.sleep(10)  # not reached

    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "log", interrupt)
        result = call("train", config)
    assert result.exit_code == 130
    assert "the first 4 steps are saved" in result.stderr
    assert [p.name for p in checkpoints(tmp_path / "run")][-1] == "step_000004"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert call("train", config).exit_code == 0
    assert stages_of(tmp_path / "run") == ["distill"] * 2 + ["compressor"] * 3


def test_an_overwriting_run_that_is_interrupted_while_it_loads_promises_no_other_run(
    config: Path, tmp_path: Path, monkeypatch
) -> None:
    assert call("train", config).exit_code == 0
    change(config, seed=1, overwrite_run_dir=True)
    engine = importlib.import_module("ttt_cache.training.engine")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "load", interrupt)
    before = sorted((tmp_path / "run").rglob("*"))
    result = call("train", config)
    assert result.exit_code == 130
    assert "interrupted; nothing was trained or overwritten yet" in result.stderr
    assert sorted((tmp_path / "run").rglob("*")) == before


def test_what_is_kept_is_not_promised_to_a_command_that_erases_it(tmp_path: Path) -> None:
    kept = sys.modules["ttt_cache.cli.train"]._kept
    settings = read_settings(write_run(tmp_path))
    assert kept(settings) == "no step was saved yet; the same command begins again"
    unkept = settings.model_copy(update={"do_ckpt": False})
    assert kept(unkept) == "no step was saved: do_ckpt is false"
    (tmp_path / "run" / "checkpoints" / "step_000004").mkdir(parents=True)
    assert kept(settings).endswith("; the same command goes on from there")
    erasing = settings.model_copy(update={"overwrite_run_dir": True})
    assert "; without overwrite_run_dir: true the same command goes on" in kept(erasing)


def test_as_a_module_for_launchers() -> None:
    command = [sys.executable, "-m", "ttt_cache.cli", "train", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert "ttt-cache train" in shown and "accelerate launch" in shown
