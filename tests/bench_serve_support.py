"""Servers of Moshi's protocol that hold answers back, for the tests of `ttt-cache bench serve`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import web
from typer.testing import CliRunner, Result

from ttt_cache.bench.serve.plan import Plan, make_plan
from ttt_cache.bench.serve.sound import FRAME, RATE
from ttt_cache.cli import main
from ttt_cache.serving.opus import Opus


def plan(url: str, out: Path = Path("unused"), **changes: Any) -> Plan:
    """A short load of one client."""
    return make_plan(url, **({"clients": [1], "seconds": 1, "warm_up": 0, "out": out} | changes))


def call(*words: object) -> Result:
    """`ttt-cache bench serve words`, in this process."""
    words = ("bench", "serve", *words)
    return CliRunner().invoke(main, [str(word) for word in words], env={"COLUMNS": "200"})


@asynccontextmanager
async def listening(chat: Callable[[web.Request], Awaitable[Any]]) -> AsyncIterator[str]:
    """A server with that for `/api/chat`; gives its address."""
    application = web.Application()
    application.router.add_get("/api/chat", chat)
    runner = web.AppRunner(application, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "localhost", 0).start()
    try:
        yield f"ws://localhost:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


class Slow:
    """Answers each frame with a frame, `together` of them in a message.

    Args:
        delay: of a model: so many first frames are answered with nothing.
        until: asked with the number of a frame when it came; how long to wait before answering.

    Attributes:
        came, answered: `time.monotonic` of each frame.
    """

    def __init__(self, delay: int, until: Callable[[int], float], together: int = 1) -> None:
        self.delay, self._until, self._together = delay, until, together
        self.came: list[float] = []
        self.answered: list[float] = []

    async def chat(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_bytes(b"\x00")
        coder, frames = Opus(RATE, FRAME), asyncio.Queue()
        answering = asyncio.ensure_future(self._answer(socket, coder, frames))
        async for message in socket:
            async for _ in coder.decode(message.data[1:]):
                frames.put_nowait(len(self.came))
                self.came.append(time.monotonic())
        answering.cancel()
        return socket

    async def _answer(self, socket: web.WebSocketResponse, coder: Opus, frames: Any) -> None:
        held = b""
        while True:
            number = await frames.get()
            await asyncio.sleep(self._until(number))
            if number < self.delay:
                continue
            held += await coder.encode(np.zeros(FRAME, np.float32))
            if (number - self.delay) % self._together == self._together - 1:
                self.answered += [time.monotonic()] * self._together
                await socket.send_bytes(b"\x02text")
                await socket.send_bytes(b"\x01" + held)
                held = b""
