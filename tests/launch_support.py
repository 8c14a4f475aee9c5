"""Moshi's programs as a user runs them: in processes of their own, or quickly in this one.

Its server is spoken to as `moshi.client` does: a handshake of one byte 0, then messages whose first
byte tells audio (1, an Ogg/Opus stream) from text (2), over a websocket.
"""

from __future__ import annotations

import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import aiohttp
import moshi.client_utils  # noqa: F401 - before CliRunner lends its stderr: it keeps what it finds
import numpy as np
import sphn
import torch
from launch_files import CONTEXT, FRAME, RATE
from moshi.models.loaders import CheckpointInfo
from typer.testing import CliRunner, Result

from ttt_cache.cli import main

ROOT = Path(__file__).parents[1]
# The beginning of a program that loads a checkpoint from its folder.
LOAD = """
import json, sys
from ttt_cache.patched import PatchedAttention
from moshi.models.loaders import CheckpointInfo
def load(folder, **options):
    return CheckpointInfo.from_hf_repo(
        "none/needed", folder + "/model.safetensors", folder + "/mimi.safetensors",
        folder + "/tokenizer.model", folder + "/config.json").get_moshi(**options)
"""
LAUNCH = ["-m", "ttt_cache.cli", "launch"]
SMALL = ["--recent", 6, "--chunk", 3, "--virtual", 3]
STOCK = ["--memory", "none", "--recent", CONTEXT]  # what makes the cache Moshi's own ring
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_WAIT_POLICY": "passive"}


def program(*words: object, cwd: Path, **options: Any) -> subprocess.Popen:
    """Start `python words`, with its output in pipes."""
    command = [sys.executable, *(str(word) for word in words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | ENVIRONMENT
    return subprocess.Popen(command, cwd=cwd, env=environment, **(pipes | options))


class Ended(NamedTuple):
    status: int
    stdout: str
    stderr: str


def ended(*words: object, cwd: Path) -> Ended:
    """The same, run to its end."""
    process = program(*words, cwd=cwd)
    stdout, stderr = process.communicate(timeout=300)
    return Ended(process.returncode, stdout, stderr)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@contextmanager
def serving(*words: object, port: int, cwd: Path) -> Iterator[subprocess.Popen]:
    """A server that listens; the body ends it with `stop`, else it is killed."""
    process = program(*words, "--port", port, "--static", "none", cwd=cwd)
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            with socket.socket() as caller:
                if caller.connect_ex(("localhost", port)) == 0:
                    break
            time.sleep(0.1)
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        process.kill()
        process.wait()


def stop(process: subprocess.Popen) -> Ended:
    """Ctrl-C, and what the program said until its end."""
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    return Ended(process.returncode, stdout, stderr)


class Answer(NamedTuple):
    """What a conversation with the server brought: samples, text, and Opus bytes."""

    samples: np.ndarray
    text: str
    opus: bytes


async def converse(port: int, speech: np.ndarray, frames: int) -> Answer:
    """Say whole frames to the server, hear until it has answered with `frames` of them."""
    writer, reader = sphn.OpusStreamWriter(RATE), sphn.OpusStreamReader(RATE)
    heard, text, opus = [np.zeros(0, np.float32)], "", b""
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session,
        session.ws_connect(f"http://localhost:{port}/api/chat") as socket,
    ):
        assert await socket.receive_bytes() == b"\x00", "the handshake"
        for start in range(0, len(speech), FRAME):
            if packet := writer.append_pcm(speech[start : start + FRAME]):
                await socket.send_bytes(b"\x01" + packet)
        while sum(map(len, heard)) < frames * FRAME:
            kind, payload = (message := await socket.receive_bytes())[0], message[1:]
            assert kind in (1, 2), "audio or text"
            if kind == 2:
                text += payload.decode()
            else:
                opus += payload
                heard.append(reader.append_bytes(payload))
    return Answer(np.concatenate(heard), text, opus)


def call(*arguments: object) -> Result:
    """`ttt-cache launch arguments`, in this process."""
    return CliRunner().invoke(main, ["launch", *(str(argument) for argument in arguments)])


def plainly(*arguments: object) -> None:
    """`python -m arguments`, in this process."""
    with patch.object(sys, "argv", [str(argument) for argument in arguments]):
        runpy.run_module(str(arguments[0]), run_name="__main__", alter_sys=True)


def as_left() -> tuple:
    """What a launch must leave as it was."""
    program = sys.argv, sys.path, sys.modules["__main__"]
    return CheckpointInfo.get_moshi, torch.cuda.synchronize, *program
