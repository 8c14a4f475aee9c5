"""One conversation in real time: a frame each 80 ms on an absolute schedule, and its answers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import aiohttp
import numpy as np

from ttt_cache.serving.codec import CODECS
from ttt_cache.serving.conversation import AUDIO, FRAME_S
from ttt_cache.serving.errors import MalformedError
from ttt_cache.serving.talk import HANDSHAKE

from .match import latencies
from .plan import Plan
from .sound import FRAME, RATE

CONNECT_S = 10.0  # for a connection and the handshake
GRACE_S = 5.0  # for the answers to the last frames
LEAVE_S = 2.0  # for a server to take note that its client leaves


class RefusedError(Exception):
    """A server did not begin a conversation; the message says why."""


class EndedError(Exception):
    """A conversation ended before its client ended it; the message says how."""


@dataclass
class Heard:
    """What a conversation showed.

    Args:
        waited: seconds for each frame from the model's delay on, as `match.latencies` says.
        behind: seconds that the client itself was late to send each frame that it sent.
        ended: how the conversation broke off; `None`: it did not.
    """

    waited: np.ndarray
    behind: np.ndarray
    ended: str | None = None


class Client:
    """A conversation that has been greeted."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, codec: str) -> None:
        self._socket, self._codec = socket, CODECS[codec](RATE, FRAME)
        self.arrived: list[float] = []  # by `time.monotonic`, of each frame that was answered
        self._behind: list[float] = []

    @classmethod
    async def connect(cls, session: aiohttp.ClientSession, plan: Plan) -> Client:
        """Begin a conversation.

        Raises:
            RefusedError: the server does not.
        """
        try:
            async with asyncio.timeout(CONNECT_S):
                socket = await session.ws_connect(plan.chat, headers=plan.headers)
                greeting = await socket.receive()
        except aiohttp.WSServerHandshakeError as error:
            raise RefusedError(_refusal(error.status)) from None
        except aiohttp.ClientConnectorCertificateError:
            raise RefusedError("its certificate is not trusted; SSL_CERT_FILE names more") from None
        except aiohttp.ClientConnectorDNSError:
            raise RefusedError("there is no such host") from None
        except aiohttp.ClientConnectorError:
            raise RefusedError("nothing listens there") from None
        except TimeoutError:
            raise RefusedError(f"no handshake within {CONNECT_S:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise RefusedError(f"it does not speak HTTP: {error}") from None
        if greeting.data != HANDSHAKE:
            await _leave(socket)
            raise RefusedError("it does not speak Moshi's protocol: its first message is not 0")
        return cls(socket, plan.codec)

    async def converse(self, messages: Sequence[bytes], begin: float, delay: int) -> Heard:
        """Say every message when it is due, the n-th n frames after `begin`; hear the answers."""
        ended = None
        hearing = asyncio.ensure_future(self.hear(len(messages) - delay))
        saying = asyncio.ensure_future(self.say(messages, begin))
        last = begin + len(messages) * FRAME_S
        try:
            async with asyncio.timeout_at(_loop_time(last + GRACE_S)):
                await hearing
                await saying  # where the last frames are answered with nothing
        except TimeoutError:
            pass  # what is not answered by now is lost
        except EndedError as error:
            ended = str(error)
        finally:
            hearing.cancel()
            saying.cancel()
            await asyncio.gather(hearing, saying, return_exceptions=True)
        due = begin + np.arange(len(messages)) * FRAME_S
        try:
            waited = latencies(due, np.array(self.arrived), delay)
        except ValueError as error:  # what cannot be matched is no answer
            waited, ended = latencies(due, np.zeros(0), delay), str(error)
        return Heard(waited, np.array(self._behind), ended)

    async def say(self, messages: Iterable[bytes], begin: float) -> None:
        """Each message when it is due, the n-th n frames after `begin`.

        Raises:
            EndedError: the connection is gone.
        """
        free = begin  # since when nothing but the schedule holds the client up
        for number, message in enumerate(messages):
            due = begin + number * FRAME_S
            await asyncio.sleep(due - time.monotonic())
            # While the server did not take the frame before, it was not the client that was late.
            self._behind.append(time.monotonic() - max(due, free))
            await self.send(message)
            free = time.monotonic()

    async def send(self, message: bytes) -> None:
        """Raises `EndedError` if the connection is gone."""
        try:
            await self._socket.send_bytes(message)
        except (ConnectionError, aiohttp.ClientError):
            raise self._end() from None

    async def receive(self) -> bytes:
        """The next message, of whatever kind. Raises `EndedError` if there is none any more."""
        message = await self._socket.receive()
        if message.type is not aiohttp.WSMsgType.BINARY:
            raise self._end()
        return message.data

    async def hear(self, frames: float) -> None:
        """Until so many frames have been answered in all.

        Raises:
            EndedError: the conversation is over before.
        """
        while len(self.arrived) < frames:
            message, now = await self.receive(), time.monotonic()
            if message[:1] != AUDIO:
                continue
            try:
                self.arrived += [now async for _ in self._codec.decode(message[1:])]
            except MalformedError as error:
                raise EndedError(f"an answer is {error}") from None

    def _end(self) -> EndedError:
        return EndedError(f"closed by the server, code {self._socket.close_code}")

    async def close(self) -> None:
        """Take leave."""
        await _leave(self._socket)


async def _leave(socket: aiohttp.ClientWebSocketResponse) -> None:
    """Close; a server that talks on is cut off: aiohttp waits anew after each of its messages."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LEAVE_S):
            await socket.close()


def _loop_time(moment: float) -> float:
    """A moment of `time.monotonic` on the event loop's clock."""
    return asyncio.get_running_loop().time() + moment - time.monotonic()


def _refusal(status: int) -> str:
    """Why an upgrade is refused, by the status of HTTP."""
    known = {
        401: "it wants another token: --token or TTT_CACHE_TOKEN",
        404: "there is no /api/chat",
        400: "it does not know the codec, or is no websocket server",
        503: "it is full: all its conversations are taken",
    }
    return f"{known.get(status, 'it refuses')} (HTTP {status})"
