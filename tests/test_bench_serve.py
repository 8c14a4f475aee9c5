"""`ttt-cache bench serve` against servers: what it measures, writes and refuses."""

from __future__ import annotations

import asyncio
import csv
import json
import re
import time
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from bench_serve_support import Slow, call, listening, plan
from serving_support import run, served
from typer.testing import Result

from ttt_cache.bench.serve import level as level_module
from ttt_cache.bench.serve import probe as probe_module
from ttt_cache.bench.serve import run as run_module
from ttt_cache.bench.serve.client import Client, Heard
from ttt_cache.bench.serve.figures import Level
from ttt_cache.bench.serve.level import measure
from ttt_cache.bench.serve.probe import probe
from ttt_cache.bench.serve.sound import messages

FRAMES = 12


async def conversation(slow: Slow, delay: int | None = None) -> tuple[Heard, float]:
    """What one client hears of a server, and when it was to begin; `delay` is what it takes for."""
    delay = slow.delay if delay is None else delay
    async with listening(slow.chat) as url, aiohttp.ClientSession() as session:
        client = await Client.connect(session, plan(url))
        begin = time.monotonic() + 0.1
        heard = await client.converse(await messages("opus", FRAMES, 0), begin, delay)
        await client.close()
        return heard, begin


@pytest.mark.parametrize(("delay", "together"), [(0, 1), (1, 1), (2, 5)])
def test_latency_counts_from_when_a_frame_was_due(delay: int, together: int) -> None:
    """A server that stalls makes the frames late that it was not sent meanwhile as well."""

    async def test() -> None:
        slow = Slow(delay, lambda number: 0.7 if number == delay else 0.01, together)
        heard, begin = await conversation(slow)
        due = begin + 0.08 * np.arange(FRAMES)
        assert heard.ended is None and len(heard.waited) == FRAMES - delay
        exact = np.array(slow.answered) - due[delay:]
        assert (exact <= heard.waited).all() and (heard.waited < exact + 1).all()
        assert heard.waited[0] >= 0.7
        # An absolute schedule, kept whatever the server does: nothing is early, nothing waits.
        assert (np.array(slow.came) >= due).all() and len(heard.behind) == FRAMES
        assert slow.came[4] < slow.answered[0]

    run(test())


def test_a_conversation_that_breaks_off_and_answers_that_do_not_come(monkeypatch) -> None:
    monkeypatch.setattr("ttt_cache.bench.serve.client.GRACE_S", 0.5)

    async def closes(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_bytes(b"\x00")
        await socket.receive()
        await socket.send_bytes(b"\x02a")
        await socket.close(code=4000)
        return socket

    async def test() -> None:
        silent, _ = await conversation(Slow(1, lambda number: 0.01 if number < 6 else 9))
        assert silent.ended is None
        assert np.isinf(silent.waited).tolist() == [False] * 5 + [True] * (FRAMES - 6)
        # A delay that was found too long matches answers to later frames.
        early, _ = await conversation(Slow(0, lambda number: 0.0), delay=1)
        assert "s before the frame that it belongs to" in (early.ended or "")
        assert np.isinf(early.waited).all()
        async with listening(closes) as url, aiohttp.ClientSession() as session:
            client = await Client.connect(session, plan(url))
            said = await messages("opus", 4, 0)
            heard = await client.converse(said, time.monotonic(), 0)
            assert heard.ended == "closed by the server, code 4000"
            assert np.isinf(heard.waited).all()

    run(test())


def test_the_delay_of_a_server_is_found_alone(monkeypatch) -> None:
    monkeypatch.setattr(probe_module, "PATIENCE_S", 1.0)
    monkeypatch.setattr(probe_module, "MOST_FRAMES", 2)

    async def test() -> None:
        for delay in (0, 1):
            async with listening(Slow(delay, lambda number: 0.0).chat) as url:
                assert await asyncio.to_thread(probe, plan(url)) == delay
        async with listening(Slow(9, lambda number: 0.0).chat) as url:
            with pytest.raises(ValueError, match="2 frames were sent and none was answered"):
                await asyncio.to_thread(probe, plan(url))

    run(test())


def test_levels_of_a_server_and_what_is_written(models, tmp_path, monkeypatch) -> None:
    """One client and two in two processes, and three where there are two rows."""
    monkeypatch.setattr(level_module, "CLIENTS", 1)
    monkeypatch.setattr(level_module.os, "cpu_count", lambda: 2)
    out = tmp_path / "out"
    words = ["--clients", 1, "--clients", 2, "--clients", 3, "--seconds", 1, "--warm-up", 0.4]

    async def test() -> Result:
        async with served(models, 2, token="s3cret") as server:
            url = f"ws://me:s3cret@localhost:{server.port}"
            return await asyncio.to_thread(call, *words, "--url", url, "--out", out)

    result = _run(test())
    assert result.exit_code == 0, result.output
    kept = json.loads((out / "serve.json").read_text())
    one, two, three = kept["levels"]
    assert [level["clients"] for level in kept["levels"]] == [1, 2, 3]
    seconds_of_frames = round(1 / 0.08)
    for level, clients in ((one, 1), (two, 2)):
        assert (level["refused"], level["broken"], level["lost"]) == (0, 0, 0), level
        assert level["frames"] == clients * seconds_of_frames
        assert 0 < level["p50_ms"] <= level["p95_ms"] <= level["p99_ms"] <= level["max_ms"]
        assert level["step_p50_ms"] > 0 and level["server_late_share"] is not None
    assert three["refused"] >= 1 and three["p99_ms"] is None and not three["held"]
    assert "it is full" in three["reasons"][0] and "it is full" in result.stdout
    assert kept["delay_frames"] == 1 and kept["server"]["rows"] == 2
    assert kept["held"] <= 2 and not kept["interrupted"]
    with (out / "serve.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["clients"] for line in lines] == ["1", "2", "3"]
    assert (out / "serve.png").read_bytes().startswith(b"\x89PNG")
    assert "s3cret" not in result.output + (out / "serve.json").read_text() + str(lines)


def _run(coroutine: Any) -> Any:
    found = []

    async def keep() -> None:
        found.append(await coroutine)

    run(keep())
    return found[0]


def test_a_server_that_stops_breaks_its_conversations(models) -> None:
    async def test() -> Level:
        async with served(models, 2) as server:
            asked = plan(f"ws://localhost:{server.port}", seconds=30)
            stopped = asyncio.ensure_future(stop(server))
            level = await asyncio.to_thread(measure, asked, 2, 1, lambda passed: None)
            await stopped
            return level

    async def stop(server: Any) -> None:
        while not all(server.engine.age(row) for row in range(2)):
            await asyncio.sleep(0.05)
        await server.host.stop()

    level = _run(test())
    assert level.broken == 2 and level.lost > 0 and not level.held
    assert level.reasons == ("2 x closed by the server, code 1001",)


@pytest.mark.parametrize("ended", [0, 2])
def test_an_interrupted_run_keeps_what_was_measured(ended, tmp_path, monkeypatch) -> None:
    def measured(asked: Any, clients: int, delay: int, tick: Any) -> Level:
        if clients > ended:
            raise KeyboardInterrupt
        tick(0.5)
        return Level(clients, frames=9, late_share=0.0, p50_ms=1, p95_ms=2, p99_ms=3, max_ms=4,
                     behind_p99_ms=70.0 if clients == 2 else 1.0)  # fmt: skip

    monkeypatch.setattr(probe_module, "probe", lambda asked: 1)
    monkeypatch.setattr(run_module, "measure", measured)
    result = call("--url", "ws://localhost:9", "--clients", 1, "--clients", 2, "--clients", 3,
                  "--out", tmp_path)  # fmt: skip
    assert result.exit_code == 130 and "interrupted" in result.stderr
    assert "Traceback" not in result.output
    assert bool(ended) is (tmp_path / "serve.json").exists()
    if ended:
        kept = json.loads((tmp_path / "serve.json").read_text())
        assert kept["interrupted"] and kept["held"] == 1 and len(kept["levels"]) == 2
        assert "With 2: the generator itself was 70.0 ms late" in result.stdout
        assert re.search(r"\n +1 .*yes *\n +2 .*unknown *\n", result.stdout)
        assert "Held in real time: at least 1 (" in result.stdout
