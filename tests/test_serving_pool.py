"""Opus in other processes: the same bytes, and nothing left of them, whoever dies first."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import moshi.client_utils  # noqa: F401 - before CliRunner lends its stderr: it keeps what it finds
import numpy as np
import pytest
import sphn
from hypothesis import given
from hypothesis import strategies as st
from launch_files import FRAME, RATE, Checkpoint
from launch_support import free_port, program
from serving_support import LENGTH, closed, connected, run, served, until
from test_serving_process import arguments, frames_in_session, running
from test_serving_refusals import call

from ttt_cache.serving import opus_worker
from ttt_cache.serving.conversation import INBOX, Conversation
from ttt_cache.serving.errors import MalformedError
from ttt_cache.serving.opus import Opus
from ttt_cache.serving.opus_process import NOT_STARTED, Worker
from ttt_cache.serving.pool import EACH, FEW, Pool, workers_for

STREAMS = 5


def alive(process: int) -> bool:
    """Whether it runs; one that has ended, and that nobody asked after, does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children(process: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def left(files: set[str], processes: list[int]) -> set[Any]:
    """What this process has open or has begun, and had not."""
    return opened() - files | set(children(os.getpid())) - set(processes)


def opened() -> set[str]:
    """What this process has open, each with its number and, if it has no name, its own."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
    return found


def pids(pool: Pool) -> list[int]:
    return [each.process.pid for each in pool._workers]


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One loop for all that a pool does."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def pool(runner: asyncio.Runner) -> Iterator[Pool]:
    pool = Pool(2)
    runner.run(pool.attach())
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def streams(heard: list[np.ndarray]) -> list[tuple[np.ndarray, list[bytes]]]:
    """Sounds, each as frames and as the messages of a client that says it."""
    sounds = [np.roll(heard[number % 4], 999 * number).reshape(-1, FRAME) for number in range(5)]
    writers = [sphn.OpusStreamWriter(RATE) for _ in sounds]
    return [
        (sound, [writer.append_pcm(frame) for frame in sound])
        for sound, writer in zip(sounds, writers, strict=True)
    ]


async def outcome(codec: Opus, kind: str, sound: np.ndarray, message: bytes) -> Any:
    """What coding brings, to be compared."""
    if kind == "encode":
        return await codec.encode(sound)
    try:
        return b"".join([frame.tobytes() async for frame in codec.decode(message)])
    except MalformedError as error:
        return str(error)


@given(
    steps=st.lists(
        st.tuples(
            st.integers(0, STREAMS - 1),
            st.sampled_from(["encode", "decode", "decode", "spoilt"]),
        ),
        max_size=24,
    )
)
def test_interleaved_streams_come_out_as_each_alone(steps, runner, pool, streams) -> None:
    """Bit for bit; what is no Opus ends its own stream only."""

    async def coded(number: int, kinds: list[str], codec: Opus) -> list[Any]:
        sound, messages = streams[number]
        done, heard = [], 0
        for at, kind in enumerate(kinds):
            message = messages[heard][::-1] if kind == "spoilt" else messages[heard]
            done.append(await outcome(codec, kind, sound[at], message))
            heard += kind != "encode"
        codec.close()
        return done

    async def test() -> None:
        kinds = [[kind for who, kind in steps if who == number] for number in range(STREAMS)]
        there = [coded(n, each, pool.opus(RATE, FRAME)) for n, each in enumerate(kinds)]
        here = [await coded(n, each, Opus(RATE, FRAME)) for n, each in enumerate(kinds)]
        assert await asyncio.gather(*there) == here
        assert [each.coders for each in pool._workers] == [0, 0]

    runner.run(test())


def test_a_long_message_is_decoded_as_there_is_room(runner, pool, monkeypatch) -> None:
    """What would be half a minute of sound lies in the message, not in memory."""
    asked = []
    ask = Worker.ask

    async def counted(*args: Any) -> bytes:
        asked.append(args)
        return await ask(*args)

    monkeypatch.setattr(Worker, "ask", counted)

    async def test() -> None:
        talk = Conversation("n", 0, pool.opus(RATE, FRAME), lambda: None, str)
        writer, sound = sphn.OpusStreamWriter(RATE), np.zeros(FRAME, np.float32)
        packets = b"".join(writer.append_pcm(sound) for _ in range(4 * INBOX))
        hearing = asyncio.ensure_future(talk.hear(packets))
        await until(lambda: len(talk._inbox) == INBOX)
        before = len(asked)
        await asyncio.sleep(0.05)
        assert not hearing.done() and len(talk._inbox) == INBOX and len(asked) == before
        for _ in range(3 * INBOX):
            await until(lambda: talk._inbox)
            talk.take()
        await hearing
        assert len(talk._inbox) == INBOX and len(asked) > before
        talk.close()

    runner.run(test())


def test_a_worker_that_is_killed_ends_its_own_conversations_only(
    models, heard, tmp_path: Path
) -> None:
    """They are closed with 1011, are on disk, and go on with the worker that takes its place."""

    async def test() -> None:
        pool = Pool(2)
        url = "/api/chat?session="
        async with served(models, 2, tmp_path / "sessions", pool=pool) as server:
            async with (
                connected(server.url(url + "new")) as lost,
                connected(server.url()) as other,
            ):
                await asyncio.gather(lost.say(heard[0][: 9 * FRAME]), other.say(heard[1]))
                await lost.hear(8)
                first, second = pids(pool)
                os.kill(first, signal.SIGKILL)
                await until(lambda: pids(pool)[0] != first)
                await lost.say(heard[0][9 * FRAME : 10 * FRAME])
                assert await closed(lost) == 1011
                await other.hear(LENGTH - 1)
            await until(lambda: server.engine.free == 2)
            async with connected(server.url(url + lost.session)) as again:
                await again.say(heard[0][: 6 * FRAME])
                await again.hear(6)
            assert pids(pool)[1] == second and not alive(first)
            assert 'ended_total{code="1011"} 1.0' in server.host.metrics.text().decode()
        pool.close()

    run(test())


def test_nothing_is_left_of_a_pool(runner: asyncio.Runner) -> None:
    async def test() -> None:
        before = opened(), children(os.getpid())
        pool = Pool(3)
        await pool.attach()
        codec = pool.opus(RATE, FRAME)
        for each in pids(pool):
            assert "torch" not in Path(f"/proc/{each}/maps").read_text()
        assert await codec.encode(np.zeros(FRAME, np.float32))
        pool.close()
        assert [each.process.returncode for each in pool._workers] == [0, 0, 0]
        await until(lambda: not left(*before))

    runner.run(test())


BROKEN = """
import os, runpy
try:
    os.mkdir({mark!r})
except FileExistsError:
    runpy.run_path({worker!r}, run_name="__main__")
"""


@pytest.mark.parametrize("broken", ["file", "python"])
def test_workers_that_cannot_start_are_a_refusal(
    broken: str, small_moshi: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them is enough, and none of the others stays."""
    before = opened(), children(os.getpid())
    said = f"{NOT_STARTED}: {'it ended before' if broken == 'file' else '[Errno 2]'}"
    if broken == "python":
        monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    else:
        code = BROKEN.format(mark=str(tmp_path / "mark"), worker=opus_worker.__file__)
        (tmp_path / "worker.py").write_text(code)
        monkeypatch.setattr(opus_worker, "__file__", str(tmp_path / "worker.py"))
    with pytest.raises(ValueError, match=re.escape(said)):
        Pool(3)
    assert not left(*before)
    shutil.rmtree(tmp_path / "mark", ignore_errors=True)
    result = call(*arguments(small_moshi, free_port()), "--rows", FEW + 1)
    assert result.exit_code == 2 and "Traceback" not in result.output and said in result.stderr
    assert not left(*before)


def test_workers_end_with_a_server_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import time; from ttt_cache.serving.pool import Pool; pool = Pool(2)\n"
        "print(*(each.process.pid for each in pool._workers), flush=True); time.sleep(60)"
    )
    with program("-c", code, cwd=tmp_path) as process:
        assert process.stdout is not None
        workers = [int(word) for word in process.stdout.readline().split()]
        assert len(workers) == 2 and all(alive(each) for each in workers)
        process.kill()
    run(until(lambda: not any(alive(each) for each in workers)))


def test_control_c_saves_all_before_the_workers_end(
    small_moshi: Checkpoint, heard: list[np.ndarray], tmp_path: Path
) -> None:
    """A terminal sends it to the whole group, a service manager its SIGTERM to every process."""
    port, folder = free_port(), tmp_path / "sessions"
    words = arguments(small_moshi, port, "--sessions", folder, "--rows", FEW + 1)

    async def talk(process: Any) -> tuple[str, int | None]:
        async with connected(f"http://localhost:{port}/api/chat") as client:
            await client.say(heard[0][: 9 * FRAME])
            await client.hear(8)
            (worker,) = children(process.pid)
            os.kill(worker, signal.SIGTERM)
            os.kill(worker, signal.SIGINT)
            await client.say(heard[0][9 * FRAME : 12 * FRAME])
            await client.hear(11)
            os.killpg(process.pid, signal.SIGINT)
            code = await closed(client)
            await until(lambda: not alive(worker), seconds=30)
            return client.session, code

    with running(words, tmp_path, start_new_session=True) as process:
        name, code = asyncio.run(talk(process))
        stdout, _ = process.communicate(timeout=30)
    assert code == 1001 and process.returncode == 0 and "Traceback" not in stdout
    assert frames_in_session(folder, name) == 12


def test_how_many_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, rows, workers in (
        (8, FEW, 0), (8, FEW + 1, 1), (8, EACH, 1), (8, EACH + 1, 2), (8, 1000, 7), (1, 1000, 1),
    ):  # fmt: skip
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        assert workers_for(rows) == workers
