"""How a launched program ends: refusals that it swallows, threads that it leaves."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from launch_files import Checkpoint
from launch_support import LAUNCH, LOAD, SMALL, as_left, call, ended, program, stop

THREAD = "import threading\nt = threading.Thread(target=load, args=[{0!r}])\nt.start()\nt.join()"
EXECUTOR = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor() as pool:
    pool.submit(load, {0!r})
"""
SWALLOWED = {
    "in a thread": THREAD,
    "in an executor that nobody asks": EXECUTOR,
    "finally": "try:\n    load({0!r})\nfinally:\n    sys.exit(0)",
    "every exception": "try:\n    load({0!r})\nexcept BaseException:\n    pass",
    "a status of its own": "try:\n    load({0!r})\nexcept SystemExit:\n    sys.exit(7)",
}


@pytest.fixture
def narrow(small_moshi: Checkpoint, tmp_path: Path) -> str:
    """A folder of the same Moshi with a context that six frames and a chunk are too many for."""
    (tmp_path / "narrow").mkdir()
    for file in small_moshi.folder.iterdir():
        (tmp_path / "narrow" / file.name).symlink_to(file)
    config = json.loads((small_moshi.folder / "config.json").read_text()) | {"context": 4}
    (tmp_path / "narrow" / "config.json").unlink()
    (tmp_path / "narrow" / "config.json").write_text(json.dumps(config))
    return str(tmp_path / "narrow")


@pytest.mark.parametrize("how", SWALLOWED)
@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_a_refusal_is_the_end_whatever_the_program_makes_of_it(
    how: str, arguments: list[str], narrow: str, script: Callable[..., str],
    small_moshi: Checkpoint, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # pytest's says more
    fits = f"{LOAD}load({str(small_moshi.folder)!r})\n"
    before = as_left()
    for code in (LOAD, fits):  # it is the only model, or the second one
        result = call(*SMALL, script(code + SWALLOWED[how].format(narrow)), *arguments)
        assert result.exit_code == 2, result.output
        last = result.stderr.splitlines()[-1]
        assert last.startswith("ttt-cache: recent + chunk - 1 must be within the context 4")
        assert result.stderr.count("must be within") == 1 and "Traceback" not in result.stderr
        assert "no cache was installed" not in result.stderr
    assert as_left() == before


def test_the_programs_own_error_after_a_refusal_is_shown_too(
    narrow: str, script: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
    result = call(*SMALL, script(f"{LOAD}{THREAD.format(narrow)}\nraise KeyError('no model')"))
    assert result.exit_code == 2 and "KeyError: 'no model'" in result.stderr
    assert "ttt-cache: recent + chunk" in result.stderr.splitlines()[-1]


LATE = """
import threading, time, __main__
from concurrent.futures import ThreadPoolExecutor
pool = ThreadPoolExecutor(1)
def late():
    time.sleep(0.5)
    lm = load({0!r})
    print(type(lm.transformer.layers[0].self_attn).__name__, __main__.late is late)
pool.submit(late)
threading.Thread(target=late).start()
threading.Thread(target=time.sleep, args=[600], daemon=True).start()
print("main is over")
"""


def test_threads_that_outlive_the_last_line_get_the_cache(
    script: Callable[..., str], small_moshi: Checkpoint, tmp_path: Path
) -> None:
    name = script(LOAD + LATE.format(str(small_moshi.folder)))
    status, stdout, stderr = ended(*LAUNCH, *SMALL, name, cwd=tmp_path)
    assert status == 0, stderr
    assert stdout.splitlines() == ["main is over", *["PatchedAttention True"] * 2]


def test_ctrl_c_ends_the_wait_for_threads(script: Callable[..., str], tmp_path: Path) -> None:
    code = "import threading, time\nthreading.Thread(target=time.sleep, args=[2]).start()"
    process = program(*LAUNCH, script(f"{code}\nprint('over', flush=True)"), cwd=tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "over\n"
    status, _, stderr = stop(process)
    assert status == 130 and "KeyboardInterrupt" in stderr and "ttt_cache" not in stderr


def test_help_excuses_only_a_program_that_asked_for_no_model(
    narrow: str, script: Callable[..., str]
) -> None:
    (Path(narrow) / "model.safetensors").unlink()
    code = f"{LOAD}try:\n    load({narrow!r})\nexcept Exception:\n    print('swallowed')"
    for arguments in ([], ["-h"]):
        result = call(script(code), *arguments)
        assert (result.exit_code, result.stdout) == (3, "swallowed\n"), result.output
        assert "without asking" not in result.stderr, "it did ask"


@pytest.mark.parametrize("error", ["asyncio.CancelledError", "GeneratorExit"])
def test_errors_that_are_no_exceptions_show_the_programs_frames_only(
    error: str, script: Callable[..., str]
) -> None:
    result = call(script(f"import asyncio\nraise {error}('said')"))
    assert result.exit_code == 1 and "said" in result.stderr
    assert result.stderr.count("File ") == 1 and 'program.py", line 2' in result.stderr


@pytest.mark.parametrize("ending", ["", "raise ValueError('said')"])
def test_with_stderr_closed_stdout_is_the_programs(
    ending: str, script: Callable[..., str], tmp_path: Path
) -> None:
    words = [sys.executable, *LAUNCH, script(f"print('done')\n{ending}")]
    closed = f"import os\nos.close(2)\nos.execv({sys.executable!r}, {words!r})"
    status, stdout, stderr = ended("-c", closed, cwd=tmp_path)
    assert (status, stdout, stderr) == (1 if ending else 3, "done\n", "")


@pytest.mark.parametrize("name", ["program.py", "folder/program"])
def test_a_script_finds_itself_from_anywhere(
    name: str, script: Callable[..., str], tmp_path: Path
) -> None:
    script("import os, sys\nos.chdir('/')\nprint(__file__, sys.argv[0], __spec__)", name)
    plain, ours = ended(name, cwd=tmp_path), ended(*LAUNCH, name, cwd=tmp_path)
    assert ours.stdout == plain.stdout == f"{tmp_path / name} {name} None\n"
    assert (plain.status, ours.status) == (0, 3), ours.stderr
