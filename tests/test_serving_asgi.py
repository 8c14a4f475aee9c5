"""The protocol over ASGI, without Ray: what a replica answers to whatever its server passes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from launch_files import FRAME
from serving_support import LENGTH, Served, run, served, until

pytest.importorskip("starlette")

from ttt_cache.serving.cluster import asgi  # noqa: E402
from ttt_cache.serving.cluster.asgi import Asgi  # noqa: E402
from ttt_cache.serving.talk import MOST_BYTES, Limits  # noqa: E402

Message = dict[str, Any]


class Connection:
    """A client of an ASGI application, as the server in front of it sees one."""

    def __init__(self, app: Any, query: str, kind: str, headers: Any) -> None:
        self.inbox: asyncio.Queue[Message | Exception] = asyncio.Queue()
        self.sent: list[Message] = []
        scope = {"type": kind, "path": "/api/chat", "query_string": query.encode(),
                 "headers": headers, "extensions": {"websocket.http.response": {}},
                 "root_path": "", "method": "GET"}  # fmt: skip
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> Message:
        message = await self.inbox.get()
        if isinstance(message, Exception):
            raise message
        return message

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    def say(self, payload: bytes) -> None:
        self.inbox.put_nowait({"type": "websocket.receive", "bytes": payload})

    def of(self, kind: str) -> list[Message]:
        return [message for message in self.sent if message["type"] == kind]

    @property
    def code(self) -> int | None:
        """That it was closed with."""
        closed = self.of("websocket.close")
        return closed[0]["code"] if closed else None

    def answers(self) -> int:
        return sum(each["bytes"][:1] == b"\x01" for each in self.of("websocket.send"))


@asynccontextmanager
async def client(
    server: Served, query: str = "codec=pcm", token: str | None = None, headers: Any = ()
) -> AsyncIterator[Connection]:
    app = Asgi(server.host, Limits(), token).application()
    connection = Connection(app, query, "websocket", headers)
    connection.inbox.put_nowait({"type": "websocket.connect"})
    try:
        yield connection
    finally:
        connection.inbox.put_nowait({"type": "websocket.disconnect", "code": 1000})
        with contextlib.suppress(asyncio.CancelledError):
            await connection.task


def as_pcm(sound: np.ndarray) -> bytes:
    return b"\x01" + (sound.clip(-1, 1) * 32767).astype("<i2").tobytes()


def test_a_conversation_and_its_row(models, heard, tmp_path) -> None:
    async def test() -> None:
        async with served(models, 1, tmp_path) as server:
            async with client(server, "codec=pcm&session=new") as talk:
                await until(lambda: len(talk.sent) >= 3)
                accepted, handshake, described = talk.sent[:3]
                name = dict(accepted["headers"])[b"X-Session-Id"].decode()
                assert handshake["bytes"] == b"\x00" and described["bytes"][:1] == b"\x04"
                assert json.loads(described["bytes"][1:])["session"] == name
                talk.inbox.put_nowait({"type": "websocket.receive", "text": "passed over"})
                for frame in np.split(heard[0], LENGTH):
                    talk.say(as_pcm(frame))
                await until(lambda: talk.answers() == LENGTH - 1)
            await until(lambda: server.engine.free == 1)
            assert talk.code is None, "the client closed it"
            async with client(server, f"codec=pcm&session={name}") as talk:
                await until(lambda: len(talk.sent) >= 3)
                assert json.loads(talk.sent[2]["bytes"][1:])["frames"] == LENGTH

    run(test())


def test_what_is_too_big_or_too_far_ahead_ends_it(models, monkeypatch) -> None:
    """Ray passes on all that comes: what is not taken in must not heap up."""

    async def test() -> None:
        async with served(models, 1) as server:
            for size, times, code in ((MOST_BYTES, 1, 1009), (FRAME * 2, 300, 1008)):
                async with client(server) as talk:
                    for _ in range(times):
                        talk.say(b"\x01" + bytes(size))
                    await until(lambda: talk.code == code)
                await until(lambda: server.engine.free == 1)
            monkeypatch.setattr(asgi, "MOST_AHEAD", 50 * asgi.PER_MESSAGE)
            async with client(server) as talk:
                talk.say(b"\x01" + bytes(40 * asgi.PER_MESSAGE))
                for _ in range(100):
                    talk.say(b"")  # takes memory, too
                await until(lambda: talk.code == 1008)

    run(test())


@pytest.mark.parametrize("how", ["cancelled", "broken"])
def test_whatever_ends_the_request_frees_the_row(how, models, heard, tmp_path) -> None:
    async def test() -> None:
        async with served(models, 1, tmp_path) as server, client(server) as talk:
            for frame in np.split(heard[0], LENGTH):
                talk.say(as_pcm(frame))
            await until(lambda: talk.answers() == LENGTH - 1)
            if how == "cancelled":
                talk.task.cancel()
            else:
                talk.inbox.put_nowait(OSError("the proxy has died"))
            await until(lambda: server.engine.free == 1)
            await until(lambda: len(list(tmp_path.glob("[!.]*.safetensors"))) == 1)

    run(test())


def test_a_request_that_is_cancelled_before_it_has_a_row(models) -> None:
    async def test() -> None:
        async with served(models, 1) as server:
            for wait in (0, 0, 1, 2, 3):
                async with client(server) as talk:
                    for _ in range(wait):
                        await asyncio.sleep(0)
                    talk.task.cancel()
                await until(lambda: server.engine.free == 1 and not server.host.conversations)

    run(test())


def test_refusals_are_what_http_has_for_them(models) -> None:
    async def test() -> None:
        async with served(models, 1) as server, client(server) as first:
            await until(lambda: first.sent)
            for query, token, headers, status in (
                ("", None, (), 503),
                ("codec=mp3", None, (), 400),
                ("session=" + "a" * 32, None, (), 404),
                ("token=wrong", "right", (), 401),
                ("", "right", [(b"authorization", b"Bearer right")], 503),
            ):
                async with client(server, query, token, headers) as other:
                    await until(lambda: len(other.sent) == 2)
                    start, body = other.sent
                    assert start["type"] == "websocket.http.response.start"
                    assert start["status"] == status, body
                    names = [name for name, _ in start["headers"]]
                    assert (b"retry-after" in names) == (status == 503)
                    assert (b"www-authenticate" in names) == (status == 401)
            app = Asgi(server.host, Limits()).application()
            plain = Connection(app, "", "http", [])
            await plain.task
            assert plain.sent[0]["status"] == 426, "no websocket"

    run(test())
