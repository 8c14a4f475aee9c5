"""Moshi's protocol over any connection that carries messages: from the handshake to the close code.

It knows neither aiohttp nor Ray: `web.py` and whoever else has connections brings them as a `Peer`.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Protocol

from .conversation import AUDIO, Conversation
from .errors import ABNORMAL, FAILED, INVALID, VIOLATION, LostError, MalformedError
from .host import Host

HANDSHAKE, METADATA = b"\x00", b"\x04"
NEW = "new"  # ?session=new: begin one, and say its name
MOST_BYTES = 64 * 1024  # in a message; a frame of Opus is 300 bytes
MOST_PASSED = 1000  # messages of other kinds from one client
CLOSE_S = 3.0  # for a client to answer that it has been closed


class Peer(Protocol):
    """The other end of a connection."""

    async def receive(self) -> bytes | int:
        """The next message, a text as `b""`; once the connection is at its end, its close code."""
        ...

    async def send(self, message: bytes) -> None:
        """Raises `ConnectionError` if the connection is gone."""
        ...

    async def close(self, code: int, reason: str) -> None:
        """Take leave. Raises `ConnectionError` if the connection is gone."""
        ...

    def abort(self) -> None:
        """Drop the connection without leave."""
        ...


@dataclass
class Limits:
    """How long a client may keep others waiting, in seconds.

    Args:
        idle: without sound.
        write: without reading what it is sent.
    """

    idle: float = 60.0
    write: float = 10.0


class Talk:
    """One conversation over one connection.

    Args:
        asked: the session that the client asked for; `None`: none, as Moshi's own clients do.
    """

    def __init__(
        self, host: Host, limits: Limits, conversation: Conversation, asked: str | None
    ) -> None:
        self._host, self._limits = host, limits
        self._conversation, self._asked = conversation, asked

    async def run(self, peer: Peer) -> int:
        """Hear and speak until either ends; returns the close code."""
        ending = self._conversation.ending
        tasks = [asyncio.ensure_future(self._speak(peer)), asyncio.ensure_future(self._hear(peer))]
        try:
            done, _ = await asyncio.wait([*tasks, ending], return_when=asyncio.FIRST_COMPLETED)
            code, reason = done.pop().result()
        finally:
            for task in (*tasks, ending):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(CLOSE_S):
                await peer.close(code, reason)
        except (TimeoutError, ConnectionError):
            peer.abort()  # whoever does not read would keep the socket open
        return code

    async def _speak(self, peer: Peer) -> tuple[int, str]:
        """Send answers until the client does not take them."""
        messages = [HANDSHAKE]
        if self._asked is not None:
            described = self._host.described(self._conversation)
            messages.append(METADATA + json.dumps(described).encode())
        try:
            while True:
                for message in messages:
                    async with asyncio.timeout(self._limits.write):
                        await peer.send(message)
                messages = await self._conversation.messages()
        except TimeoutError:
            return VIOLATION, "the client does not read what it is sent"
        except ConnectionError:
            return ABNORMAL, "the connection is gone"
        except LostError as error:
            return FAILED, str(error)

    async def _hear(self, peer: Peer) -> tuple[int, str]:
        """Take in messages until there are no more; returns a close code and why."""
        loop = asyncio.get_running_loop()
        deadline, passed = loop.time() + self._limits.idle, 0
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    message = await peer.receive()
            except TimeoutError:
                return VIOLATION, "no sound came for too long"
            if isinstance(message, int):
                return message, ""
            # As in Moshi's server, what is of another kind is passed over.
            if message[:1] != AUDIO:
                passed += 1
                if passed > MOST_PASSED:
                    return VIOLATION, "too many messages that are no sound"
                continue
            try:
                await self._conversation.hear(message[1:])
            except MalformedError as error:
                return INVALID, str(error)[:100]
            except LostError as error:
                return FAILED, str(error)
            deadline = loop.time() + self._limits.idle
