"""`ttt-cache serve` in a process: killed and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from launch_files import FRAME, Checkpoint
from launch_support import SMALL, Ended, free_port, program
from serving_support import Client, connected, greedy, voices

from ttt_cache.serving.sessions import Sessions
from ttt_cache.session_file import read_session

ROWS, EVERY = 3, 5  # seconds
LENGTH = 90  # frames: more than 7 seconds


def arguments(checkpoint: Checkpoint, port: int, *more: object, config: str = "") -> list[str]:
    flags = checkpoint.flags(config or greedy(checkpoint), flag="--config-path")
    return [str(word) for word in ("serve", "--port", port, "--rows", ROWS, *SMALL, *flags, *more)]


@contextmanager
def running(words: list[str], cwd: Path, **options: Any) -> Iterator[subprocess.Popen]:
    """A server that has said that it serves; whatever becomes of it, it is gone afterwards."""
    process = program("-m", "ttt_cache.cli", *words, cwd=cwd, stderr=subprocess.STDOUT, **options)
    try:
        said: list[str] = []
        for line in process.stdout or ():
            said.append(line)
            if "conversations at http" in line:
                break
        else:
            raise AssertionError("".join(said))
        yield process
    finally:
        process.kill()
        process.wait()


def ended(process: subprocess.Popen, how: signal.Signals) -> Ended:
    process.send_signal(how)
    stdout, _ = process.communicate(timeout=60)
    return Ended(process.returncode, stdout, "")


async def at_pace(client: Client, pcm: np.ndarray) -> None:
    """Say a frame each 80 ms, and none before the last one is answered."""
    for number, frame in enumerate(np.split(pcm, len(pcm) // FRAME)):
        await client.say(frame)
        await asyncio.sleep(0.08)
        await client.hear(number - 1)


async def talk_until(
    process: subprocess.Popen, how: signal.Signals, urls: list[str], sounds: list[np.ndarray]
) -> list[tuple[str, int, int | None]]:
    """Several talk at once until the server is ended so.

    Returns: of each its session's name, the frames that the model has had for certain, and the code
    that it was closed with.
    """
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(url)) for url in urls]
        await asyncio.gather(*map(at_pace, clients, sounds))
        process.send_signal(how)
        for client in clients:
            with contextlib.suppress(TypeError, aiohttp.ClientError):
                await client.hear_for(30)
        return [(each.session, round(each.frames), each.socket.close_code) for each in clients]


def frames_in_session(folder: Path, name: str) -> int:
    return int(read_session(Sessions(folder, 1).path(name))[0]["rows.gen.offsets"])


def test_killed_and_stopped_servers_go_on(small_moshi: Checkpoint, tmp_path: Path) -> None:
    """After kill -9 from what was saved at most an interval before; after SIGTERM, from its end."""
    port, sounds = free_port(), voices(small_moshi.speech, ROWS, LENGTH)
    folder = tmp_path / "sessions"
    words = arguments(small_moshi, port, "--sessions", folder, "--save-every", EVERY)
    url = f"http://localhost:{port}/api/chat?session="
    with running(words, tmp_path) as process:
        new = [url + "new"] * ROWS
        before = asyncio.run(talk_until(process, signal.SIGKILL, new, sounds))
    names = [name for name, _, _ in before]
    kept = [frames_in_session(folder, name) for name in names]
    for (_, had, _), saved in zip(before, kept, strict=True):
        assert LENGTH - 2 - EVERY / 0.08 <= had - EVERY / 0.08 <= saved <= LENGTH
    short = [sound[: 6 * FRAME] for sound in sounds]
    with running(words, tmp_path) as process:
        known = [url + name for name in names]
        after = asyncio.run(talk_until(process, signal.SIGTERM, known, short))
        stdout, _ = process.communicate(timeout=30)
    assert [(name, code) for name, _, code in after] == [(name, 1001) for name in names]
    assert process.returncode == 0 and f"stopping; conversations that end: {ROWS}" in stdout
    assert "Traceback" not in stdout
    assert [frames_in_session(folder, name) for name in names] == [each + 6 for each in kept]


HANGS = """
import asyncio, threading
from ttt_cache.serving.signals import signalled
threading.Thread(target=threading.Event().wait).start()  # as a write to a disk that hangs
async def serve():
    asyncio.get_running_loop().call_soon(print, "serves")  # which is after `signalled` has begun
    await signalled()
    print("stops")
asyncio.run(serve())
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_waits_for_nothing(how: signal.Signals, tmp_path: Path) -> None:
    process = program("-u", "-c", HANGS, cwd=tmp_path)
    try:
        for said in ("serves", "stops"):
            assert process.stdout is not None and process.stdout.readline().strip() == said
            process.send_signal(how)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == -how and "Traceback" not in stderr
    finally:
        process.kill()
        process.wait()


def certificate(folder: Path) -> None:
    """Write cert.pem and key.pem."""
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-keyout", "key.pem", "-out", "cert.pem"),
        ],
        cwd=folder,
        check=True,
        capture_output=True,
    )


def test_tls(small_moshi: Checkpoint, tmp_path: Path) -> None:
    certificate(tmp_path)
    port, (pcm,) = free_port(), voices(small_moshi.speech, 1, 6)
    with running(arguments(small_moshi, port, "--ssl", tmp_path), tmp_path) as process:

        async def talk() -> None:
            async with connected(f"https://localhost:{port}/api/chat", ssl=False) as client:
                await client.say(pcm)
                await client.hear(5)

        asyncio.run(talk())
        assert ended(process, signal.SIGINT).status == 0
