"""Strangers at the door of a server: who holds out is dropped, and nobody is kept out."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from serving_support import closed, connected, run, served, until
from test_serving_process import certificate

from ttt_cache.serving import accept
from ttt_cache.serving.accept import Door
from ttt_cache.serving.gauge import MOST_HELD
from ttt_cache.serving.listen import bound, tls

ASK = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@asynccontextmanager
async def door(context: ssl.SSLContext | None = None) -> AsyncIterator[tuple[Door, int]]:
    """One behind which somebody says that he is well, or says a great deal, and its port."""

    async def health(request: web.Request) -> web.Response:
        return web.Response(text="well")

    async def much(request: web.Request) -> web.Response:
        return web.Response(body=bytes(30_000_000))

    application = web.Application()
    application.router.add_get("/health", health)
    application.router.add_get("/much", much)
    listeners = bound("127.0.0.1", 0)
    made = Door(application, listeners, 1, context)
    await made.open()
    try:
        yield made, listeners[0].getsockname()[1]
    finally:
        await made.close()


async def told(port: int, request: bytes, context: ssl.SSLContext | None = None) -> bytes:
    """All that is answered to a request until the connection is closed."""
    with contextlib.suppress(ConnectionError):  # perhaps in the midst of a handshake
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        with contextlib.closing(writer):
            writer.write(request)
            return await reader.read()
    return b""


def later(seconds: float) -> None:
    """Let time pass for all that the running event loop waits for.

    Limits short enough to wait for are too short for whoever is to keep within them on a busy
    machine.
    """
    loop = asyncio.get_running_loop()
    now = loop.time
    loop.time = lambda: now() + seconds  # type: ignore[method-assign]


def test_a_connection_asks_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(accept, "ANSWER_S", 1000)

    async def test() -> None:
        async with door() as (made, port):
            answer = await told(port, ASK)
            assert answer.startswith(b"HTTP/1.1 200 OK") and answer.endswith(b"well")
            assert b"\r\nConnection: close\r\n" in answer
            assert await told(port, ASK * 2) == b"", "more than it may say before it is answered"
            for nonsense in (b"nonsense\r\n\r\n", ASK.replace(b"1.1", b"9.9")):
                assert (await told(port, nonsense)).startswith(b"HTTP/1.0 400")
            await until(lambda: made.connections == 0)

    run(test())
    assert not caplog.records, "the operator is not told what strangers say"


def test_a_message_that_does_not_end_is_not_held(models) -> None:
    """aiohttp looks at a frame's size when it is all there; this one announces four gigabytes."""
    upgrade = (
        b"GET /api/chat?codec=pcm HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
        b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )

    async def test() -> None:
        async with served(models, 1) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(upgrade)
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"\x82\xff" + (2**32).to_bytes(8, "big") + bytes(4))
            sent = 0
            with contextlib.suppress(ConnectionError):
                while sent < 32 * MOST_HELD:
                    writer.write(bytes(65536))
                    await writer.drain()
                    sent += 65536
            assert sent < 8 * MOST_HELD
            await until(lambda: server.engine.free == 1)
            writer.transport.abort()

    run(test())


def test_requests_that_never_end_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = [b"", b"G", b"\r\n\r\n", ASK[:-1], b"GET / HTTP/1.1\r\nX: " + bytes(100_000)]

    async def test() -> None:
        async with door() as (made, port):
            with monkeypatch.context() as hasty:
                hasty.setattr(accept, "REQUEST_S", 0.3)
                hasty.setattr(accept, "ANSWER_S", 0.6)
                assert await asyncio.gather(*(told(port, each) for each in begun)) == [b""] * 5
            assert await told(port, ASK)
            await until(lambda: made.connections == 0)

    run(test())


def test_the_oldest_that_says_nothing_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accept, "MARGIN", 3)

    async def test() -> None:
        async with door() as (made, port):
            silent = []
            for number in range(6):
                silent.append(asyncio.ensure_future(told(port, b"")))
                await until(lambda n=number: made.connections == min(n + 1, 4))
            await until(lambda: silent[1].done())
            assert [each.done() for each in silent] == [True] * 2 + [False] * 4
            assert await told(port, ASK), "a newcomer is heard"
            await until(lambda: silent[2].done())
            assert [each.done() for each in silent] == [True] * 3 + [False] * 3
        assert all(each.done() for each in await finished(silent)), "closed with the server"

    run(test())


async def finished(tasks: list[asyncio.Future]) -> list[asyncio.Future]:
    await asyncio.wait(tasks)
    return tasks


def test_who_does_not_read_an_answer_is_dropped() -> None:
    async def test() -> None:
        async with door() as (made, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=10)
            writer.write(ASK.replace(b"health", b"much"))
            assert await reader.readexactly(12) == b"HTTP/1.1 200"
            later(accept.ANSWER_S / 2)
            await asyncio.sleep(0.05)
            assert made.connections == 1
            later(accept.ANSWER_S / 2)
            await until(lambda: made.connections == 0)
            writer.close()

    run(test())


def test_tls_that_is_not_begun_or_broken_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate(tmp_path)
    trusting = ssl.create_default_context(cafile=tmp_path / "cert.pem")
    trusting.check_hostname = False

    async def test() -> None:
        async with door(tls(tmp_path)) as (made, port):
            with monkeypatch.context() as hasty:
                hasty.setattr(accept, "REQUEST_S", 0.5)
                assert await told(port, b"") == b"", "no handshake"
                await told(port, b"no handshake at all\r\n\r\n")
                assert await told(port, ASK[:-1], trusting) == b""
            assert (await told(port, ASK, trusting)).endswith(b"well")
            await until(lambda: made.connections == 0)

    run(test())


def test_those_who_talk_are_not_counted_as_strangers(
    models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full house of silent connections neither keeps a client out nor ends one."""
    monkeypatch.setattr(accept, "MARGIN", 2)

    async def test() -> None:
        async with served(models, 2) as server, connected(server.url()) as first:
            later(accept.ANSWER_S + 1)
            silent = [asyncio.ensure_future(told(server.port, b"")) for _ in range(12)]
            await until(lambda: sum(each.done() for each in silent) >= 9)
            async with connected(server.url()):
                pass
            await first.socket.send_bytes(b"\x01no Ogg at all" * 9)
            assert await closed(first) == 1007, "it was still there"
        await finished(silent)

    run(test())


def test_pings_and_empty_sound_are_not_endless(models) -> None:
    async def test() -> None:
        async with served(models, 1) as server:
            for message in (b"\x01", None):
                async with connected(server.url()) as client:
                    with contextlib.suppress(ConnectionError):
                        for _ in range(1100):
                            if message is None:
                                await client.socket.ping()
                            else:
                                await client.socket.send_bytes(message)
                    assert await closed(client) == 1008
                await until(lambda: server.engine.free == 1)
            async with connected(server.url(), autoping=False) as client:
                await client.socket.ping(b"you")
                assert (await client.socket.receive()).data == b"you", "it is answered"

    run(test())
