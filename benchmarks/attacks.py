"""What strangers do to a server, each in bounded numbers and time; see serve_attack.py.

Every attack returns how its attempts ended, counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections import Counter

import aiohttp
from strangers import FRAME, TOKEN, WIDE, Target, closed_by, endless, raw, status, times, upgraded


async def malformed(target: Target, count: int) -> Counter[str]:
    """No Opus, half a sample, broken websocket frames."""
    chance = random.Random(0)

    async def attempt() -> str:
        kind = chance.randrange(3)
        if kind == 0:
            return await closed_by(target, [b"\x01" + chance.randbytes(200)] * 4)
        if kind == 1:
            return await closed_by(target, [b"\x01" + bytes(3)], "codec=pcm")
        return await raw(target, os.urandom(2000), 30)

    return await times(count, min(4, target.spare), attempt)


async def oversized(target: Target, count: int) -> Counter[str]:
    """Messages of 1 MB, and requests without end."""

    async def attempt() -> str:
        if random.random() < 0.5:
            return await closed_by(target, [b"\x01" + bytes(1_000_000)])
        return await endless(target)

    return await times(count, min(4, target.spare), attempt)


async def slow_readers(target: Target, seconds: float) -> Counter[str]:
    """Talk at the pace of speech, and read nothing."""

    async def attempt() -> str:
        began = time.monotonic()
        _, writer = await upgraded(target)
        with contextlib.closing(writer):
            while time.monotonic() - began < seconds:
                # A client's binary message, its mask all zeros.
                writer.write(b"\x82\xfe" + len(FRAME).to_bytes(2) + bytes(4) + FRAME)
                await asyncio.sleep(0.08)
                if writer.transport.is_closing():
                    return "closed"
        return "not closed"

    return await times(target.spare, target.spare, attempt)


async def half_open(target: Target, count: int, seconds: float) -> Counter[str]:
    """Connect and say nothing, or half a request byte by byte, or upgrade and say nothing."""
    ended = Counter[str]()

    async def silent(slowly: bool) -> None:
        try:
            async with asyncio.timeout(seconds):
                reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
                with contextlib.closing(writer):
                    reading = asyncio.ensure_future(reader.read())
                    while slowly and not reading.done():
                        writer.write(b"G")
                        await asyncio.sleep(0.5)
                    await reading
            ended["closed"] += 1
        except TimeoutError:
            ended["not closed"] += 1
        except OSError:
            ended["closed"] += 1

    async def idle() -> None:
        ended[f"upgraded: {await raw(target, b'', seconds)}"] += 1

    async def newcomer() -> None:
        await asyncio.sleep(1)
        began = time.monotonic()
        answer = await status(target, "wrong", seconds)
        ended[f"newcomer: {answer} in {time.monotonic() - began:.1f} s"] += 1

    await asyncio.gather(
        *(idle() for _ in range(target.spare)),
        *(silent(number % 2 == 0) for number in range(count)),
        newcomer(),
    )
    return ended


async def wrong_tokens(target: Target, count: int) -> Counter[str]:
    return await times(count, WIDE, lambda: status(target, "wrong"))


async def attempts(target: Target, count: int) -> Counter[str]:
    """The right token, while all rows are taken."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession(headers=headers))
        sockets = []
        for _ in range(target.spare):
            sockets.append(await _seated(session, target.url("codec=pcm")))
            stack.push_async_callback(sockets[-1].close)

        async def stay() -> None:
            while True:
                for socket in sockets:
                    await socket.send_bytes(FRAME)
                await asyncio.sleep(1)

        staying = asyncio.ensure_future(stay())
        try:
            return await times(count, WIDE, lambda: status(target, TOKEN))
        finally:
            staying.cancel()


async def _seated(session: aiohttp.ClientSession, url: str) -> aiohttp.ClientWebSocketResponse:
    """Connect, perhaps once those have left who had the rows in the attack before."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await session.ws_connect(url)
            except aiohttp.WSServerHandshakeError:
                await asyncio.sleep(0.1)
