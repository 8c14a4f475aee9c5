"""Single attempts on a server on this machine; see attacks.py."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aiohttp

TOKEN = "right"
WIDE = 50  # attempts at once
UPGRADE = (
    "GET /api/chat?{query} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    "Authorization: Bearer {token}\r\n\r\n"
)
FRAME = b"\x01" + bytes(3840)  # 80 ms of silence in plain samples


@dataclass
class Target:
    """A server on this machine, with so many rows that nobody talks in."""

    port: int
    spare: int

    def url(self, query: str = "") -> str:
        return f"http://127.0.0.1:{self.port}/api/chat?{query}"


async def times(count: int, wide: int, attempt: Callable[[], Awaitable[str]]) -> Counter[str]:
    """Make an attempt so often, some at once."""
    ended, left = Counter[str](), iter(range(count))

    async def worker() -> None:
        for _ in left:
            ended[await attempt()] += 1

    await asyncio.gather(*(worker() for _ in range(wide)))
    return ended


async def status(target: Target, token: str, seconds: float = 30) -> str:
    """Ask for a websocket; returns the status, or what came instead."""
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
            with contextlib.closing(writer):
                writer.write(UPGRADE.format(query="", token=token).encode())
                line = await reader.readline()
                return line.split()[1].decode() if line else "closed"
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return type(error).__name__


async def closed_by(target: Target, messages: list[bytes], query: str = "") -> str:
    """Connect, send, wait; returns the code that the server closes with."""
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as session:
        try:
            async with asyncio.timeout(30), session.ws_connect(target.url(query)) as socket:
                with contextlib.suppress(ConnectionError):
                    for message in messages:
                        await socket.send_bytes(message)
                while (await socket.receive()).type is aiohttp.WSMsgType.BINARY:
                    pass
                return f"close {socket.close_code}"
        except aiohttp.WSServerHandshakeError as error:
            return str(error.status)
        except TimeoutError:
            return "not closed"


async def raw(target: Target, data: bytes, seconds: float) -> str:
    """Upgrade, send anything, and wait for the end."""
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await upgraded(target)
            with contextlib.closing(writer):
                writer.write(data)
                while await reader.read(1024):
                    pass
        return "closed"
    except TimeoutError:
        return "not closed"
    except (ConnectionError, EOFError):
        return "closed"


async def upgraded(target: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port, limit=1024)
    writer.write(UPGRADE.format(query="codec=pcm", token=TOKEN).encode())
    await reader.readuntil(b"\r\n\r\n")
    return reader, writer


async def endless(target: Target) -> str:
    try:
        async with asyncio.timeout(30):
            reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
            with contextlib.closing(writer):
                writer.write(b"GET / HTTP/1.1\r\nX: " + bytes([65]) * 1_000_000)
                await reader.read()
        return "closed"
    except TimeoutError:
        return "not closed"
    except ConnectionError:
        return "closed"
