"""Servers that share a port: a newcomer is refused only when all of them are full."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from serving_support import run, served, until
from test_serving_process import certificate

from ttt_cache.serving.accept import Door
from ttt_cache.serving.cluster import neighbours as module
from ttt_cache.serving.cluster.neighbours import ROOM, Machine, meeting_place
from ttt_cache.serving.cluster.passing import listening, listens, receive, send
from ttt_cache.serving.errors import RefusedError
from ttt_cache.serving.listen import bound, tls
from ttt_cache.serving.sessions import new_name

pytest.importorskip("ray")


class House:
    """A server without a model: it has seats."""

    def __init__(self, seats: int) -> None:
        self.free = seats

    def application(self) -> web.Application:
        made = web.Application()
        made.router.add_get("/", self.talk)
        return made

    async def talk(self, request: web.Request) -> web.StreamResponse:
        if not self.free:
            raise web.HTTPServiceUnavailable
        self.free -= 1
        try:
            await asyncio.sleep(0.01)  # until there is a row
            ws = web.WebSocketResponse()
            await ws.prepare(request)
            assert request.transport is not None
            request.transport.resume_reading()
            async for _ in ws:
                pass
            return ws
        finally:
            self.free += 1


class Street:
    """Houses at one port, and their clients."""

    def __init__(self, folder: Path, seats: list[int], context: ssl.SSLContext | None) -> None:
        self.folder, self.houses, self.doors, self.port = folder, [], [], 0
        for number, each in enumerate(seats):
            house = House(each)
            listeners = bound("127.0.0.1", self.port, shared=True)
            self.port = listeners[0].getsockname()[1]
            machine = Machine(folder, f"house{number}")
            free = partial(getattr, house, "free")
            door = Door(house.application(), listeners, each, context, machine, free)
            self.houses.append(house)
            self.doors.append(door)

    @property
    def free(self) -> int:
        return sum(each.free for each in self.houses)

    def told(self) -> bool:
        """Whether each house knows what there is."""
        for number, door in enumerate(self.doors):
            told = (self.folder / f"house{number}.room").read_bytes()
            if len(told) != ROOM.size or ROOM.unpack(told)[:2] != door._room():
                return False
        return True

    async def come(self, client: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse | None:
        """A client's connection; `None`: it was refused since all is full."""
        scheme = "https" if self.doors[0]._context else "http"
        try:
            return await client.ws_connect(f"{scheme}://127.0.0.1:{self.port}/", ssl=False)
        except aiohttp.WSServerHandshakeError as error:
            assert error.status == 503
            return None


@asynccontextmanager
async def street(
    folder: Path, *seats: int, context: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[Street, aiohttp.ClientSession]]:
    made = Street(folder, list(seats), context)
    for each in made.doors:
        await each.open()
    await until(made.told)
    try:
        async with aiohttp.ClientSession() as client:
            yield made, client
    finally:
        for each in made.doors:
            await each.close()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("secure", [False, True])
def test_whoever_comes_gets_in_while_there_is_a_seat(
    seed: int, secure: bool, tmp_path: Path
) -> None:
    """They come and go in any order, one after the other."""
    chance, context = random.Random(seed), None
    if secure:
        certificate(tmp_path)
        context = tls(tmp_path)

    async def test() -> None:
        seats = [chance.randrange(4) for _ in range(chance.randrange(2, 5))]
        async with street(tmp_path, *seats, context=context) as (made, client):
            inside = []
            for _ in range(40):
                if inside and chance.random() < 0.3:
                    await inside.pop(chance.randrange(len(inside))).close()
                    await until(lambda: made.free == sum(seats) - len(inside))
                    await until(made.told)
                    continue
                came = await made.come(client)
                assert (came is None) == (len(inside) == sum(seats))
                if came is not None:
                    inside.append(came)

    run(test())


@pytest.mark.parametrize("seats", [[2, 2], [1, 0, 4, 2], [8, 1, 1]])
def test_all_seats_are_taken_by_those_who_come_at_once(seats: list[int], tmp_path: Path) -> None:
    async def test() -> None:
        for _ in range(3):
            async with street(tmp_path, *seats) as (made, client):
                coming = [made.come(client) for _ in range(sum(seats) + 3)]
                came = await asyncio.gather(*coming)
                assert sum(each is not None for each in came) == sum(seats)

    run(test())


ASK = (
    b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def test_who_is_at_the_door_has_a_seat_until_he_has_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All connect, then all ask; and between that and the answer nobody is forgotten."""
    left, hand_on = [], Door._hand_on

    def watched(self: Door, *words: Any) -> None:
        before = self._room()
        hand_on(self, *words)
        left.append(self._room() == before)

    monkeypatch.setattr(Door, "_hand_on", watched)

    async def test() -> None:
        for _ in range(4):
            async with street(tmp_path, 3, 3) as (made, _), contextlib.AsyncExitStack() as stack:
                clients = []
                for _ in range(6):
                    clients.append(await asyncio.open_connection("127.0.0.1", made.port))
                    stack.callback(clients[-1][1].close)
                await until(lambda: sum(each.connections for each in made.doors) == 6)
                for _, writer in clients:
                    writer.write(ASK)
                answers = [await reader.readline() for reader, _ in clients]
                assert [b" 101 " in each for each in answers] == [True] * 6
        assert left == [True] * 24

    run(test())


def test_who_says_nothing_keeps_nobody_out(tmp_path: Path) -> None:
    async def test() -> None:
        async with street(tmp_path, 1, 1) as (made, client), contextlib.AsyncExitStack() as silent:
            for _ in range(6):
                _, writer = await asyncio.open_connection("127.0.0.1", made.port)
                silent.callback(writer.close)
            await until(lambda: sum(each.connections for each in made.doors) == 6)
            await until(made.told)
            came = [await made.come(client) for _ in range(4)]
            assert [bool(each) for each in came] == [True, True, False, False]

    run(test())


def claimed(folder: Path, name: str, ago: float = 0.0) -> Path:
    """The file of a neighbour that has a great deal of room; returns the path of its socket."""
    (folder / f"{name}.room").write_bytes(ROOM.pack(100, 100, time.monotonic() - ago))
    return folder / f"{name}.socket"


def test_who_was_killed_is_forgotten(tmp_path: Path) -> None:
    async def test() -> None:
        listening(claimed(tmp_path, "before"), 1).close()
        async with street(tmp_path, 1, 0) as (made, client):
            assert not list(tmp_path.glob("before.*")), "by whoever comes after it"
            listening(claimed(tmp_path, "after"), 1).close()
            claimed(tmp_path, "without")
            came = [await made.come(client) for _ in range(5)]
            assert came[0] and not any(came[1:])
        assert not list(tmp_path.glob("house*")), "who ends leaves nothing"

    run(test())


def test_who_does_not_take_anything_is_passed_over(tmp_path: Path) -> None:
    async def test() -> None:
        async with street(tmp_path, 1, 1) as (made, client):
            with contextlib.ExitStack() as stack:
                hung = claimed(tmp_path, "hung")
                stack.enter_context(listening(hung, 0))
                ours, _ = socket.socketpair()
                while send(hung, ours, 0):
                    ours, _ = socket.socketpair()
                stack.enter_context(listening(claimed(tmp_path, "late", module.ALIVE_S), 1))
                came = [await made.come(client) for _ in range(5)]
                assert all(came[:2]) and not any(came[2:])
                assert listens(hung) and hung.exists(), "it may live"

    run(test())


def test_what_is_sent_to_a_neighbour(tmp_path: Path) -> None:
    """Connections, with what was said before; whatever else comes is passed over."""
    path = tmp_path / "socket"

    async def test() -> None:
        assert not listens(path) and not send(path, socket.socketpair()[0], 0)
        with listening(path, 8) as listener:
            assert listens(path)
            for message in (b"", b"x"):  # without a connection
                with socket.socket(socket.AF_UNIX) as stranger:
                    stranger.connect(str(path))
                    stranger.sendall(message)
            here, there = socket.socketpair()
            with there:
                there.sendall(b"said before")
                assert send(path, here, 7) and here.fileno() == -1
                received, number = await receive(listener)
                with received:
                    assert number == 7 and received.recv(20) == b"said before"
                    assert not received.getblocking() and not received.get_inheritable()
                assert there.recv(1) == b"", "nobody else has it open"

    run(test())


def test_the_meeting_place_is_for_its_user_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's are too long for a socket
        meet(Path(folder), monkeypatch)


def meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place = meeting_place("a server")
    assert place == meeting_place("a server") != meeting_place("another")
    assert place.stat().st_mode & 0o777 == 0o700
    place.chmod(0o770)
    with pytest.raises(ValueError, match="this user alone"):
        meeting_place("a server")
    place.rmdir()
    place.symlink_to(tmp_path)
    with pytest.raises(ValueError, match="this user alone"):
        meeting_place("a server")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("x" * 100)))
    with pytest.raises(ValueError, match="TMPDIR must be shorter"):
        meeting_place("a server")


def test_a_seat_is_taken_before_anything_else_happens(models, tmp_path: Path) -> None:
    """Else the door would promise it to somebody else in between."""

    async def test() -> None:
        async with served(models, 3, tmp_path) as server:
            new = asyncio.ensure_future(server.host.admit(None))
            unknown = asyncio.ensure_future(server.host.admit(new_name()))
            await asyncio.sleep(0)
            assert server.host.free == 1
            with pytest.raises(RefusedError, match="no such session"):
                await unknown
            conversation = await new
            assert server.host.free == 2
            await server.host.leave(conversation, 1000)
            assert server.host.free == 3
            server.host._seats.stopping = True
            assert server.host.free == 0, "nobody is to come here"

    run(test())
