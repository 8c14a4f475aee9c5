"""`ttt-cache launch` and what it cannot do: a sentence, an exit status, nothing of ours between."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launch_files import Checkpoint, add_model
from launch_support import LOAD, SMALL, as_left, call
from models import tiny_lm

import ttt_cache


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("nosuch.module", "ttt-cache: nosuch.module cannot be run: "),
        ("moshi.nosuch", "No module named moshi.nosuch"),
        ("moshi", "'moshi' is a package and cannot be directly executed"),
        ("sys", "ttt-cache: sys cannot be run: "),
        ("..x", "ttt-cache: ..x cannot be run: "),
        ("nosuch.py", "nosuch.py cannot be run: [Errno 2] No such file or directory"),
        ("./nosuch", "./nosuch cannot be run: [Errno 2] No such file or directory"),
        ("", "Missing argument 'MODULE'"),
        ("--recnt 5 moshi.server", "No such option: --recnt"),
        ("--recent x moshi.server", "must be a whole number, got 'x'"),
        ("--recent -1 moshi.server", "recent must be at least 0, got -1"),
        ("--layers 3-1 moshi.server", "--layers must name spans upwards"),
        ("--preset best moshi.server", "preset must be one of"),
        ("--ttt-cache a/b --recent 5 moshi.server", "--ttt-cache and --recent exclude"),
        ("--ttt-cache a/b --layers all moshi.server", "--ttt-cache and --layers exclude"),
        ("--ttt-cache not/a/folder moshi.server", "folder not/a/folder does not exist"),
        ("--ttt-cache . moshi.server", "folder . has no adapter_config.json"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    arguments: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    before = as_left()
    result = call(*arguments.split())
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert says in re.sub(r"\x1b\[[0-9;]*m", "", result.stderr)
    assert "Traceback" not in result.stderr
    assert as_left() == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--layers", "5"], "layers must be between -2 and 1 for a transformer of 2 layers, got 5"),
        (["--recent", "100"], "recent + chunk - 1 must be within the context 12 of layer 0"),
        (["--ttt-cache", "adapter"], "num_layers: the adapter is for 3, this model has 2"),
    ],
)
def test_a_cache_that_does_not_fit_ends_the_program(
    words: list[str], says: str, script: Callable[..., str], small_moshi: Checkpoint
) -> None:
    lm = tiny_lm()
    with ttt_cache.patch(lm, recent=6):
        ttt_cache.save_adapter(lm, "adapter")
    name = script(f"{LOAD}try:\n    load({str(small_moshi.folder)!r})\n"
                  "except Exception:\n    pass\nprint('went on')")  # fmt: skip
    result = call(*words, name)
    assert result.exit_code == 2 and says in result.stderr
    assert "Traceback" not in result.stderr and "went on" not in result.stdout


def test_a_damaged_adapter_is_refused_before_the_program_runs(script: Callable[..., str]) -> None:
    script("{", "adapter/adapter_config.json")
    script("", "adapter/adapter_model.safetensors")
    result = call("--ttt-cache", "adapter", script("print('ran')"))
    assert result.exit_code == 2 and result.stdout == ""
    assert "adapter/adapter_config.json is not valid JSON" in result.stderr


def test_without_cuda_a_hint_follows_the_programs_own_error(
    script: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code = "import torch\ntorch.cuda.synchronize()\nraise AssertionError('Torch without CUDA')"
    result = call(script(code))
    assert result.exit_code == 1 and "AssertionError: Torch without CUDA" in result.stderr
    assert result.stderr.endswith(
        "program.py asked for CUDA, which this machine has not: give it --device cpu\n"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    synchronised = script("import torch\nassert torch.cuda.synchronize.__module__ == 'torch.cuda'")
    assert "CUDA" not in call(synchronised).stderr


@pytest.mark.parametrize("missing", ["model.safetensors", "mimi.safetensors", "tokenizer.model"])
def test_missing_files_are_the_programs_own_error(missing: str, small_moshi: Checkpoint) -> None:
    flags = [str(f).replace(missing, "nosuch.model") for f in small_moshi.flags()]
    result = call(*SMALL, "moshi.run_inference", *flags, small_moshi.speech)
    assert result.exit_code == 1 and "nosuch.model" in result.stderr
    assert 'moshi/models/loaders.py"' in result.stderr and "launch.py" not in result.stderr


def test_mismatched_files_are_the_programs_own_error(small_moshi: Checkpoint) -> None:
    config = json.loads((small_moshi.folder / "config.json").read_text())
    (small_moshi.folder / "wide.json").write_text(json.dumps(config | {"dim": 128}))
    flags = small_moshi.flags("wide.json")
    result = call(*SMALL, "moshi.run_inference", *flags, small_moshi.speech)
    assert result.exit_code == 1 and "size mismatch" in result.stderr


def test_an_int8_file_meets_moshis_own_limit(small_moshi: Checkpoint) -> None:
    """Moshi 0.2.13 rounds the scales of its int8 files on loading, and then refuses them."""
    add_model(small_moshi, "int8", quantize=True)
    flags = [*small_moshi.flags("int8.json", weights="int8"), "--batch-size", 1]
    result = call(*SMALL, "moshi.run_inference", *flags, small_moshi.speech)
    assert result.exit_code == 1 and "layers 0-1 of 2 on cpu keep 6 frames" in result.stderr
    assert "Expected `weight_scb` to have type float, but got bfloat16" in result.stderr
