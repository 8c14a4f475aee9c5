"""Servers that share a port: a newcomer is refused only when all of them are full."""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path
from typing import Any

import pytest
from serving_support import run, served, until
from street_support import street
from test_serving_process import certificate

from ttt_cache.serving.accept import Door
from ttt_cache.serving.errors import RefusedError
from ttt_cache.serving.listen import tls
from ttt_cache.serving.sessions import new_name

pytest.importorskip("ray")


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
