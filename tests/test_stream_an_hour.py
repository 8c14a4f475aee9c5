"""The example that streams an hour: killed, it goes on as if nothing had been."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launch_files import EXAMPLES, Checkpoint, frames_in

import ttt_cache

SCRIPT = EXAMPLES / "stream_an_hour.py"


def command(small_moshi: Checkpoint, out: Path, *options: object) -> list[str]:
    words = [sys.executable, SCRIPT, "--small", small_moshi.folder, "--out", out, "--device", "cpu"]
    words += ["--infile", small_moshi.speech, "--save-every", 1, "--recent", 4, *options]
    return [str(word) for word in words]


def test_killed_it_answers_as_if_it_had_not_been(small_moshi: Checkpoint, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # 75 frames: the file two and a half times, six times the context.
    said = [command(small_moshi, out, "--seconds", 6) for out in (whole, parts)]
    subprocess.run(said[0], check=True, cwd=tmp_path, timeout=120)
    process = subprocess.Popen(said[1], cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list(parts.glob("session-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (parts / "answer.wav").exists(), "killed before its end"
    last = subprocess.run(said[1], cwd=tmp_path, timeout=120, capture_output=True, text=True)
    assert last.returncode == 0 and f"going on with {parts / 'session'}" in last.stdout
    assert "75/75 frames" in last.stdout, "the bar ends where the run does"
    assert (parts / "answer.wav").read_bytes() == (whole / "answer.wav").read_bytes()
    assert frames_in(parts / "answer.wav") == 74, "one frame less: the delay"
    assert [path.name for path in parts.iterdir()] == ["answer.wav"]


def in_process(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> object:
    """Run it here; returns what it would end with."""
    monkeypatch.setattr(sys, "argv", words[1:])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(words[1], run_name="__main__")
    return end.value.code


@pytest.fixture
def interrupted(small_moshi: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that ended when it had saved once, after 12 frames."""
    out = tmp_path / "out"

    def save(*args: Any) -> None:
        ttt_cache.session.save_session(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as once:
        once.setattr(ttt_cache, "save_session", save)
        end = in_process(once, command(small_moshi, out, "--seconds", 2))
    assert end == "interrupted; the same command goes on"
    assert sorted(path.name[:17] for path in out.iterdir()) == ["answer.s16", "session-000000012"]
    return out


def session(out: Path) -> Path:
    return next(out.glob("session-*"))


def another_input(out: Path) -> list[object]:
    (out / "another.wav").write_bytes((EXAMPLES / "speech.wav").read_bytes())
    return ["--infile", out / "another.wav"]


CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no answer": (lambda out: (out / "answer.s16").unlink(), "answer.s16 must hold the "),
    "a short answer": (lambda out: os.truncate(out / "answer.s16", 7), "has said, got 7: remove "),
    "a truncated session": (lambda out: os.truncate(session(out), 999), "is truncated or not a"),
    "another input": (another_input, "was begun with another --infile: give that, or another"),
    "other settings": (lambda _: ["--recent", 5], "recent"),
    "no such input": (lambda _: ["--infile", "nosuch.wav"], "--infile: [Errno 2] No such file"),
    "no sound": (lambda _: ["--infile", __file__], "--infile: "),
    "recent out of range": (lambda _: ["--recent", -1], "recent must be at least 0, got -1"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_it_cannot_go_on_with_is_one_sentence(
    case: str, interrupted: Path, small_moshi: Checkpoint, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    change, says = CASES[case]
    options = change(interrupted)
    before = {path.name: path.read_bytes() for path in interrupted.iterdir()}
    words = command(small_moshi, interrupted, "--seconds", 2, *(options or []))
    capsys.readouterr()
    assert in_process(monkeypatch, words) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("stream_an_hour.py: ") and says in stderr, stderr
    assert stderr.count("\n") == 1
    assert {path.name: path.read_bytes() for path in interrupted.iterdir()} == before


def test_what_a_session_has_said_is_on_the_disk_before_it(
    small_moshi: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, safe = os.fsync, {"answer.s16": 0, "answer.wav": 0}
    saved = []

    def fsync(handle: int) -> None:
        synced(handle)
        safe[Path(os.readlink(f"/proc/self/fd/{handle}")).name] = os.fstat(handle).st_size

    def save(gen: Any, file: Path, mimi: Any) -> None:
        saved.append((int(file.name.split("-")[1]), safe["answer.s16"]))
        ttt_cache.session.save_session(gen, file, mimi)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(ttt_cache, "save_session", save)
    words = command(small_moshi, tmp_path, "--seconds", 3)
    monkeypatch.setattr(sys, "argv", words[1:])
    runpy.run_path(words[1], run_name="__main__")
    assert saved == [(frames, 2 * 1920 * (frames - 1)) for frames in (12, 24, 36)]
    assert safe["answer.wav"] == (tmp_path / "answer.wav").stat().st_size
