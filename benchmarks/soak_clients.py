"""Clients that talk for hours at full speed, and are compared message by message: for serve_soak.

Twins say the same, one some frames after the other: whatever they are answered must be the same
bytes, since each is to get what it would get alone.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import aiohttp
import numpy as np
import sphn

RATE, FRAME = 24_000, 1920
DELAY = 1  # frames before the first answer of the small model
AHEAD = 20  # frames that a client sends before the first of them is answered
REST_S = 2.0  # after the last answer, for what should not come
AUDIO, TEXT = 1, 2


@dataclass
class Twins:
    """Two conversations that must be answered alike.

    Attributes:
        compared: messages of one that were held against the other's.
        differ: of those.
        first: number of the first that differed.
        unmatched: of both, those that wait for the other's.
    """

    compared: int = 0
    differ: int = 0
    first: int | None = None
    unmatched: deque[tuple[int, bytes]] = field(default_factory=deque)

    def heard(self, twin: int, message: bytes) -> None:
        if not self.unmatched or self.unmatched[0][0] == twin:
            self.unmatched.append((twin, message))
            return
        if self.unmatched.popleft()[1] != message:
            self.differ += 1
            self.first = self.compared if self.first is None else self.first
        self.compared += 1


@dataclass
class Client:
    """What became of one conversation.

    Attributes:
        answered: whole frames of sound that came back.
        remainder: samples of a frame that did not come back whole.
        texts: messages of text.
        digest: of all that it was answered.
        code: what the connection was closed with, if it was.
    """

    codec: str
    sent: int = 0
    answered: int = 0
    remainder: int = 0
    texts: int = 0
    digest: int = 0
    code: int | None = None


def packets(codec: str, sound: np.ndarray) -> Iterator[bytes]:
    """A voice's messages without end; `sound`: float32 `[frames, FRAME]`, said again and again."""
    if codec == "pcm":
        frames = (sound.clip(-1, 1) * 32767).astype("<i2")
        yield from itertools.cycle(b"\x01" + frame.tobytes() for frame in frames)
    writer = sphn.OpusStreamWriter(RATE)
    for frame in itertools.cycle(sound):
        yield b"\x01" + writer.append_pcm(frame)


async def converse(
    url: str, client: Client, frames: int, voice: Iterator[bytes], twins: Twins, twin: int
) -> None:
    """Say so many frames, as fast as they are answered, and hear until nothing more comes."""
    reader = sphn.OpusStreamReader(RATE)
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"{url}/api/chat?codec={client.codec}") as socket,
    ):
        room = asyncio.Semaphore(AHEAD)

        async def say() -> None:
            for message in itertools.islice(voice, frames):
                await room.acquire()
                await socket.send_bytes(message)
                client.sent += 1

        assert await socket.receive_bytes() == b"\x00", "the handshake"
        saying, samples = asyncio.ensure_future(say()), 0
        while True:
            done = client.answered >= frames - DELAY
            try:
                received = await socket.receive(REST_S if done else None)
            except TimeoutError:
                break
            if received.type is not aiohttp.WSMsgType.BINARY:
                client.code = socket.close_code
                break
            message = received.data
            twins.heard(twin, message)
            client.digest = hash((client.digest, message))
            if message[0] == TEXT:
                client.texts += 1
                continue
            sound = message[1:]
            samples += len(sound) // 2 if client.codec == "pcm" else len(reader.append_bytes(sound))
            for _ in range(samples // FRAME - client.answered):
                room.release()
            client.answered, client.remainder = divmod(samples, FRAME)
        saying.cancel()
        await asyncio.gather(saying, return_exceptions=True)


@dataclass
class Crowd:
    """Pairs of twins, each pair with a voice and a codec of its own.

    Args:
        sounds: float32 `[voices, frames, FRAME]`.
        starts: answers of all before each client connects.
    """

    url: str
    frames: int
    sounds: np.ndarray
    codecs: list[str]
    starts: list[int]

    def __post_init__(self) -> None:
        self.clients = [Client(codec) for codec in self.codecs for _ in range(2)]
        self.twins = [Twins() for _ in self.codecs]

    @property
    def answered(self) -> int:
        return sum(client.answered for client in self.clients)

    async def talk(self) -> float:
        """Until all have said everything; returns the seconds that it took."""
        began, talking = time.monotonic(), []
        for pair, (codec, sound) in enumerate(zip(self.codecs, self.sounds, strict=True)):
            for twin, voice in enumerate(itertools.tee(packets(codec, sound))):
                talking.append(self._one(2 * pair + twin, voice))
        await asyncio.gather(*talking)
        return time.monotonic() - began

    async def _one(self, number: int, voice: Iterator[bytes]) -> None:
        while self.answered < self.starts[number]:
            await asyncio.sleep(0.05)
        pair, twin = divmod(number, 2)
        client, twins = self.clients[number], self.twins[pair]
        await converse(self.url, client, self.frames, voice, twins, twin)
