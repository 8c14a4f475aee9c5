"""`ttt-cache serve` as its clients see it: rows that come and go, sessions, limits, refusals."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import aiohttp
import numpy as np
import pytest
from launch_files import FRAME, Checkpoint
from serving_support import Client, Models, Reply, Served, connected, served, voices

VOICES, LENGTH = 4, 24
DELAY = 1  # frames before the first answer


@pytest.fixture(scope="module")
def models(small_moshi: Checkpoint) -> Models:
    return Models.of(small_moshi)


@pytest.fixture(scope="module")
def heard(small_moshi: Checkpoint) -> list[np.ndarray]:
    return voices(small_moshi.speech, VOICES, LENGTH)


def run(coroutine: Any) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await coroutine

    asyncio.run(limited())


def text_of(replies: list[Reply], models: Models) -> str:
    pieces = [models.piece(r[1]).replace("▁", " ") for r in replies if r and r[1] not in (0, 3)]
    return "".join(pieces)


async def said_to(server: Served, pcm: np.ndarray) -> tuple[np.ndarray, str]:
    """A whole conversation: samples and text."""
    frames = len(pcm) // FRAME
    async with connected(server.url()) as client:
        speaking = asyncio.ensure_future(client.say(pcm))
        await client.hear(frames - DELAY)
        await client.hear_for(0.05)  # the last text comes after the sound
        await speaking
    return client.samples, client.text


def test_eight_clients_that_come_and_go_are_each_answered_as_if_alone(models, heard) -> None:
    """Opus loses something on the way in, so alone means: the only client of the same server."""

    async def test() -> None:
        chance = random.Random(0)
        async with served(models, 8) as server:
            alone = [await said_to(server, pcm) for pcm in heard]
            assert len({text for _, text in alone}) == VOICES, "or no mixed rows would be seen"

            async def come_and_go() -> None:
                for _ in range(3):
                    await asyncio.sleep(chance.uniform(0, 0.3))
                    voice, frames = chance.randrange(VOICES), chance.randrange(8, LENGTH + 1)
                    samples, text = await said_to(server, heard[voice][: frames * FRAME])
                    expected = alone[voice][0][: len(samples)]
                    assert len(samples) >= (frames - DELAY) * FRAME
                    np.testing.assert_allclose(samples, expected, atol=1e-3)
                    assert alone[voice][1].startswith(text) and (frames < LENGTH or text)

            await asyncio.gather(*(come_and_go() for _ in range(8)))
            await until(lambda: server.engine.free == 8)
            assert server.host.conversations == 0

    run(test())


def test_a_session_goes_on_where_it_was(models, heard, tmp_path) -> None:
    async def test() -> None:
        async with served(models, 2, tmp_path / "s") as server:
            async with connected(server.url("/api/chat?session=new")) as client:
                name = client.session
                await client.say(heard[0])
                await client.hear(LENGTH - DELAY)
            await until(lambda: server.engine.free == 2)
            assert len(list((tmp_path / "s").glob("*.safetensors"))) == 1
            assert not [path for path in (tmp_path / "s").iterdir() if name in path.name]
            async with connected(server.url(f"/api/chat?session={name}")) as client:
                assert client.session == name
                row = next(iter(server.clock.conversations))
                assert server.engine.age(row) == LENGTH
                await client.say(heard[0])
                await client.hear(LENGTH)  # no delay: it has something to say at once
                await client.hear_for(0.05)
                assert client.session == name, "said after the handshake, too"

    run(test())


async def until(condition: Any, seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def test_who_comes_back_takes_over_from_a_dead_connection(models, heard, tmp_path) -> None:
    async def test() -> None:
        async with (
            served(models, 1, tmp_path) as server,
            connected(server.url("/api/chat?session=new")) as first,
        ):
            await first.say(heard[0])
            await first.hear(LENGTH - DELAY)
            ending = asyncio.ensure_future(closed(first))
            async with connected(server.url(f"/api/chat?session={first.session}")) as second:
                assert second.session == first.session
                assert server.engine.age(0) == LENGTH
                assert await ending == 4001

    run(test())


async def closed(client: Client) -> int | None:
    """Wait until the server has closed a connection; returns the code."""
    with contextlib.suppress(TypeError):  # a message that is no answer
        await client.hear_for(30)
    return client.socket.close_code


@pytest.mark.parametrize(
    ("query", "status", "reason"),
    [
        ("?session=" + "a" * 32, 404, "no such session"),
        ("?session=../../etc/passwd", 404, "no such session"),
        ("?session=" + "%2e%2e%2f" * 3, 404, "no such session"),
        ("?session=%00", 404, "no such session"),
        ("?session=", 404, "no such session"),
    ],
)
def test_unknown_sessions_are_refused(query, status, reason, models, tmp_path) -> None:
    async def test() -> None:
        async with served(models, 1, tmp_path) as server:
            assert await refused(server.url("/api/chat" + query)) == (status, reason)
            assert server.engine.free == 1

    run(test())


async def refused(url: str, **options: Any) -> tuple[int, str]:
    """Status and reason of an upgrade that is refused."""
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
               "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}  # fmt: skip
    upgrade |= options.pop("headers", {})
    async with (
        aiohttp.ClientSession() as session,
        session.get(url, headers=upgrade, **options) as response,
    ):
        return response.status, await response.text()


def test_a_session_of_another_model_and_a_damaged_one(models, heard, tmp_path) -> None:
    async def test() -> None:
        async with served(models, 1, tmp_path) as server:
            async with connected(server.url()) as client:
                await client.say(heard[0][: 3 * FRAME])
                await client.hear(2)
            await until(lambda: server.engine.free == 1)
            (file,) = tmp_path.glob("*.safetensors")
            whole = file.read_bytes()
            file.write_bytes(whole[: len(whole) // 2])
            url = server.url(f"/api/chat?session={client.session}")
            assert await refused(url) == (409, "the session is not of this model")
            file.write_bytes(whole)
            parameter = next(models.batched[0].parameters())
            parameter.data.add_(1)
            try:
                assert await refused(url) == (409, "the session is not of this model")
            finally:
                parameter.data.sub_(1)
            assert server.engine.free == 1

    run(test())


def test_full_and_without_sessions(models) -> None:
    async def test() -> None:
        async with served(models, 1) as server:
            assert (await refused(server.url("/api/chat?session=" + "a" * 32)))[0] == 404
            async with connected(server.url()):
                status, reason = await refused(server.url())
                assert (status, reason) == (503, "all conversations are taken; try again later")
                many = await asyncio.gather(*(refused(server.url()) for _ in range(200)))
                assert {status for status, _ in many} == {503}
            await until(lambda: server.engine.free == 1)
            async with connected(server.url()):
                pass

    run(test())


def test_tokens(models) -> None:
    async def test() -> None:
        async with served(models, 1, token="s3cret") as server:
            for options in (
                {},
                {"headers": {"Authorization": "Bearer wrong"}},
                {"headers": {"Authorization": "Basic !"}},
                {"auth": aiohttp.BasicAuth("me", "wrong", "utf-8")},
            ):
                assert await refused(server.url(), **options) == (401, "a token is needed")
                assert await refused(server.url("/metrics"), **options) == (
                    401,
                    "a token is needed",
                )
            assert (await refused(server.url("/health")))[0] == 200
            async with connected(server.url(), headers={"Authorization": "Bearer s3cret"}):
                pass
            await until(lambda: server.engine.free == 1)
            async with connected(server.url("/api/chat?token=s3cret")):
                pass
            await until(lambda: server.engine.free == 1)
            # As moshi.client --url ws://me:TOKEN@host gives it.
            async with connected(
                server.url().replace("//", "//me:s3cret@"),
            ):
                pass

    run(test())


def test_health_and_metrics(models, heard) -> None:
    async def test() -> None:
        async with served(models, 2) as server, aiohttp.ClientSession() as session:
            async with connected(server.url()) as client:
                await client.say(heard[0])
                await client.hear(LENGTH - DELAY)
                async with session.get(server.url("/health")) as response:
                    assert await response.json() == {"status": "ok", "conversations": 1}
                async with session.get(server.url("/metrics")) as response:
                    text = await response.text()
            for line in (
                f"ttt_cache_frames_total {LENGTH}.0",
                "ttt_cache_conversations 1.0",
                "ttt_cache_rows 2.0",
                f"ttt_cache_state_bytes {float(server.engine.state_bytes()):g}",
                f"ttt_cache_step_seconds_count {LENGTH}.0",
            ):
                assert line in text.splitlines(), text
            assert "ttt_cache_late_frames_total" in text
            server.host.stopping = True
            async with session.get(server.url("/health")) as response:
                assert response.status == 503

    run(test())
