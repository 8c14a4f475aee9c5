"""Moshi's protocol over any connection that carries messages: from the handshake to the close code.

It knows neither aiohttp nor Ray: `web.py` and whoever else has connections brings them as a `Peer`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from .conversation import AUDIO, Conversation
from .errors import ABNORMAL, FAILED, INVALID, VIOLATION, LostError, MalformedError
from .host import Host

HANDSHAKE, METADATA = b"\x00", b"\x04"
NEW = "new"  # ?session=new: begin one, and say its name
MOST_BYTES = 64 * 1024  # in a message; a frame of Opus is 300 bytes
MOST_PASSED = 1000  # messages that bring no frame, from one client between two frames
MOST_HELD = 256 * 1024  # bytes in them, which a decoder may hold: a packet may be that long
CLOSE_S = 3.0  # for a client to answer that it has been closed
Ended = tuple[int, str | None]  # a close code, and why; `None`: it is closed already


class Peer(Protocol):
    """The other end of a connection."""

    async def receive(self) -> bytes | int:
        """The next message, a text or a ping as `b""`; once the connection is at its end, its close
        code. Raises `ConnectionError` if the connection is gone.
        """
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


async def converse(
    host: Host,
    limits: Limits,
    asked: str | None,
    codec: str,
    connect: Callable[[Conversation], Awaitable[Peer]],
) -> None:
    """One conversation, from its row to its last message.

    Args:
        asked: the session that the client asked for; `None`: none, as Moshi's own clients do.
        codec: one of `CODECS`.
        connect: lets the client in, once there is a row for it. Raises `ConnectionError` if it is
            gone.

    Raises:
        RefusedError: the client is to be turned away.
    """
    conversation = await host.admit(None if asked == NEW else asked, codec)
    code = ABNORMAL
    try:
        peer = await connect(conversation)
        code = await Talk(host, limits, conversation, asked).run(peer)
    except ConnectionError:
        pass  # it went before it was connected
    finally:
        # Not to be cancelled with the connection: the row must be freed, and saved.
        await asyncio.shield(host.leave(conversation, code))


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
            await asyncio.wait([ending, *tasks], return_when=asyncio.FIRST_COMPLETED)
            # Of several at once the server's own reason counts: who is taken over must hear so.
            code, reason = next(each for each in (ending, *tasks) if each.done()).result()
        finally:
            for task in (*tasks, ending):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if reason is not None:
            try:
                async with asyncio.timeout(CLOSE_S):
                    await peer.close(code, reason)
            except (TimeoutError, ConnectionError):
                peer.abort()  # whoever does not read would keep the socket open
        return code

    async def _speak(self, peer: Peer) -> Ended:
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
            return ABNORMAL, None
        except LostError as error:
            return FAILED, str(error)

    async def _hear(self, peer: Peer) -> Ended:
        """Take in messages until there are no more."""
        loop = asyncio.get_running_loop()
        deadline, passed, held = loop.time() + self._limits.idle, 0, 0
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    message = await peer.receive()
            except TimeoutError:
                return VIOLATION, "no sound came for too long"
            except ConnectionError:
                return ABNORMAL, None
            if isinstance(message, int):
                return message, None
            try:
                # As in Moshi's server, what is of another kind is passed over.
                sound = message[1:] if message[:1] == AUDIO else b""
                frames = await self._conversation.hear(sound)
            except MalformedError as error:
                return INVALID, str(error)[:100]
            except LostError as error:
                return FAILED, str(error)
            # Sound of which no frame ever comes keeps nobody connected, and costs no less.
            passed, held = (0, 0) if frames else (passed + 1, held + len(message))
            if passed > MOST_PASSED or held > MOST_HELD:
                return VIOLATION, "too much that is no sound"
            if frames:
                deadline = loop.time() + self._limits.idle
