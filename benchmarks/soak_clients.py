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
from voices import DELAY, ahead, packets

from ttt_cache.bench.serve.client import Client, EndedError
from ttt_cache.bench.serve.plan import make_plan
from ttt_cache.bench.serve.sound import FRAME, RATE
from ttt_cache.serving.conversation import AUDIO, TEXT

REST_S = 2.0  # after the last answer, for what should not come


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
class Talk:
    """What became of one conversation.

    Attributes:
        answered: whole frames of sound that came back.
        remainder: samples of a frame that did not come back whole.
        texts: messages of text.
        digest: of all that it was answered.
        ended: how the server ended it, if it did.
    """

    codec: str
    sent: int = 0
    answered: int = 0
    remainder: int = 0
    texts: int = 0
    digest: int = 0
    ended: str | None = None

    def said(self, voice: Iterator[bytes]) -> Iterator[bytes]:
        """Its messages; one has been sent when the next one is asked for."""
        for message in voice:
            yield message
            self.sent += 1


async def converse(
    client: Client, talk: Talk, frames: int, voice: Iterator[bytes], twins: Twins, twin: int
) -> None:
    """Say so many frames, as fast as they are answered, and hear until nothing more comes."""
    # Not the client's own coder, which is the server's and keeps what is no whole frame.
    reader, samples = sphn.OpusStreamReader(RATE), 0
    async with ahead(client, talk.said(itertools.islice(voice, frames))) as answered:
        while True:
            done = talk.answered >= frames - DELAY
            try:
                async with asyncio.timeout(REST_S if done else None):
                    message = await client.receive()
            except TimeoutError:
                return
            except EndedError as error:
                talk.ended = str(error)
                return
            twins.heard(twin, message)
            talk.digest = hash((talk.digest, message))
            talk.texts += message[:1] == TEXT
            if message[:1] != AUDIO:
                continue
            sound = message[1:]
            samples += len(sound) // 2 if talk.codec == "pcm" else len(reader.append_bytes(sound))
            for _ in range(samples // FRAME - talk.answered):
                answered()
            talk.answered, talk.remainder = divmod(samples, FRAME)


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
        self.talks = [Talk(codec) for codec in self.codecs for _ in range(2)]
        self.twins = [Twins() for _ in self.codecs]

    @property
    def answered(self) -> int:
        return sum(talk.answered for talk in self.talks)

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
        talk, twins = self.talks[number], self.twins[pair]
        async with aiohttp.ClientSession() as session:
            client = await Client.connect(session, make_plan(self.url, codec=talk.codec))
            try:
                await converse(client, talk, self.frames, voice, twins, twin)
            finally:
                await client.close()
