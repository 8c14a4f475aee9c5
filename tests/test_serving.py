"""`ttt-cache serve` as its clients see it: rows that come and go, refusals, tokens, metrics."""

from __future__ import annotations

import asyncio
import random

import aiohttp
import numpy as np
from launch_files import FRAME
from serving_support import (
    LENGTH,
    VOICES,
    Served,
    connected,
    refused,
    run,
    served,
    until,
)

DELAY = 1  # frames before the first answer


async def said_to(server: Served, pcm: np.ndarray) -> tuple[np.ndarray, str]:
    """A whole conversation: samples and text."""
    frames = len(pcm) // FRAME
    async with connected(server.url()) as client:
        speaking = asyncio.ensure_future(client.say(pcm))
        await client.hear(frames - DELAY)
        await client.hear_for(0.05)  # the last text comes after the sound
        await speaking
    await until(
        lambda: client.session not in server.host._seats.here
    )  # its row is free for the next
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


def test_pages_of_other_addresses_need_a_token(models) -> None:
    """A browser lets any page connect to localhost."""

    async def test() -> None:
        async with served(models, 1) as server:
            for origin in ("https://elsewhere.example", "http://localhost:1", "null", "localhost"):
                status, _ = await refused(server.url(), headers={"Origin": origin})
                assert status == 403, origin
            assert 'refused_total{reason="origin"} 4.0' in server.host.metrics.text().decode()
            own = server.url().rpartition("/api")[0].replace("ws://", "http://")
            async with connected(server.url(), headers={"Origin": own}):
                pass
        async with served(models, 1, token="s3cret") as server:
            url = server.url("/api/chat?token=s3cret")
            async with connected(url, headers={"Origin": "https://elsewhere.example"}):
                pass

    run(test())


def test_health_and_metrics(models, heard) -> None:
    async def test() -> None:
        async with served(models, 2) as server, aiohttp.ClientSession() as session:
            async with connected(server.url()) as client:
                await client.say(heard[0])
                await client.hear(LENGTH - DELAY)
                async with session.get(server.url("/health")) as response:
                    assert await response.json() == {
                        "status": "ok",
                        "conversations": 1,
                        "rows": 2,
                        "sessions": False,
                        "token": False,
                    }
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
            server.host._seats.stopping = True
            async with session.get(server.url("/health")) as response:
                assert response.status == 503

    run(test())
