"""The example that streams an hour: killed, it goes on as if nothing had been."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from launch_files import EXAMPLES, Checkpoint, frames_in

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
    assert (parts / "answer.wav").read_bytes() == (whole / "answer.wav").read_bytes()
    assert frames_in(parts / "answer.wav") == 74, "one frame less: the delay"
    assert [path.name for path in parts.iterdir()] == ["answer.wav"]
