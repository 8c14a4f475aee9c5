"""`ttt-cache launch`: what it runs, what the program sees, what it leaves, how it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moshi.client_utils  # noqa: F401 - before CliRunner lends its stderr: it keeps what it finds
import pytest
from launch_files import Checkpoint
from launch_support import LAUNCH, LOAD, SMALL, STOCK, as_left, call, ended
from models import tiny_lm
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo

from ttt_cache.launch import from_settings, handed_out

LOADS = (
    LOAD
    + """
lm = load(sys.argv[1])
print([type(layer.self_attn).__name__ for layer in lm.transformer.layers])
print(json.dumps([__name__, sys.argv, sys.path[0]]))
"""
)


OWN = ["--recent", "x", "--help-me", "--", "--ttt-cache", "-h=1"]


@pytest.mark.parametrize("name", ["program.py", "folder/program.py", "package.program", "runs"])
def test_scripts_and_modules_run_as_python_runs_them(
    name: str, script: Callable[..., str], small_moshi: Checkpoint, tmp_path: Path
) -> None:
    file = {"package.program": "package/program.py", "runs": "runs/__main__.py"}.get(name, name)
    script(LOADS, file)
    before = as_left()
    result = call(*SMALL, "--layers", -1, name, small_moshi.folder, *OWN)
    assert result.exit_code == 0, result.output
    classes, facts = result.stdout.splitlines()
    assert classes == "['StreamingMultiheadAttention', 'PatchedAttention']"
    main_name, argv, path = json.loads(facts)
    assert main_name == "__main__" and argv[1:] == [str(small_moshi.folder), *OWN]
    assert Path(argv[0]).resolve() == tmp_path / file
    assert Path(path) == (tmp_path / "folder" if name == "folder/program.py" else tmp_path)
    assert "ttt-cache: layers 1 of 2 on cpu keep 6 frames and memory ttt-mlp;" in result.stderr
    assert as_left() == before


def test_what_python_prints_of_a_program_is_what_launch_prints(
    script: Callable[..., str], tmp_path: Path
) -> None:
    name = script("def f():\n    print('before', flush=True)\n    return {}['key']\nf()\n")
    plain, ours = ended(name, cwd=tmp_path), ended(*LAUNCH, name, cwd=tmp_path)
    assert plain.status == ours.status == 1 and plain.stdout == ours.stdout == "before\n"
    assert ours.stderr == plain.stderr, "no frames but the program's"


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("pass", 0),
        ("sys.exit()", 0),
        ("sys.exit(0)", 0),
        ("sys.exit(7)", 7),
        ("sys.exit('said')", 1),
        ("raise KeyboardInterrupt", 130),
        ("raise ValueError('said')", 1),
    ],
)
def test_exit_statuses_are_the_programs(
    ending: str, status: int, script: Callable[..., str], small_moshi: Checkpoint
) -> None:
    before = as_left()
    result = call(*SMALL, script(f"{LOAD}load({str(small_moshi.folder)!r})\n{ending}\n"))
    assert result.exit_code == status, result.output
    assert ("said" in result.output) == ("said" in ending)
    assert as_left() == before


@pytest.mark.parametrize(
    ("arguments", "status"), [([], 3), (["--verbose"], 3), (["--help"], 0), (["-h"], 0)]
)
def test_a_program_that_loads_no_model_did_not_get_the_cache(
    arguments: list[str], status: int, script: Callable[..., str]
) -> None:
    result = call(script("print('done')"), *arguments)
    assert (result.exit_code, result.stdout) == (status, "done\n")
    assert ("no cache was installed (exit status 3)" in result.stderr) == bool(status)
    failed = call(script("import sys; sys.exit(5)"))
    assert failed.exit_code == 5 and "no cache" not in failed.stderr


def test_moshis_own_help_is_shown() -> None:
    result = call("moshi.run_inference", "--help")
    assert result.exit_code == 0 and "--moshi-weight" in result.stdout
    assert "--ttt-cache" not in result.stdout


def test_the_programs_seed_decides_alone_what_it_samples(
    script: Callable[..., str], small_moshi: Checkpoint
) -> None:
    code = f"{LOAD}import torch\ntorch.manual_seed(5)\nload({str(small_moshi.folder)!r})\n"
    name = script(code + "print(torch.rand(1).item())")
    drawn = [call(*words, name).stdout for words in (STOCK, SMALL)]
    assert drawn[0] == drawn[1] and float(drawn[0])


def test_only_what_is_handed_out_meanwhile_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[LMModel] = []

    def get_moshi(self: Any, *args: Any, **options: Any) -> LMModel:
        models.append(tiny_lm())
        return models[-1]

    monkeypatch.setattr(CheckpointInfo, "get_moshi", get_moshi)
    info = CheckpointInfo(Path(), Path(), Path())
    install = from_settings({"recent": 6})
    with pytest.raises(KeyError), handed_out(install) as handed:
        assert CheckpointInfo.get_moshi.__name__ == "get_moshi"
        assert info.get_moshi() is models[0] and info.get_moshi() is models[1]
        raise KeyError
    assert info.get_moshi() is models[2] and CheckpointInfo.get_moshi is get_moshi
    patched = [bool(getattr(m.transformer, "ttt_cache", None)) for m in models]
    assert patched == [True, True, False] and len(handed.installed) == 2
