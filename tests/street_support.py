"""Servers without a model that share a port: houses of a street, each with seats."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import aiohttp
from aiohttp import web
from serving_support import until

from ttt_cache.serving.accept import Door
from ttt_cache.serving.cluster.neighbours import ROOM, Machine
from ttt_cache.serving.listen import bound


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
