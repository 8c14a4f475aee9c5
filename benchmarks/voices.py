"""What clients of a small Moshi say, and how some say it as fast as they are answered."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager

import numpy as np
import sphn

from ttt_cache.bench.serve.client import Client
from ttt_cache.bench.serve.sound import RATE
from ttt_cache.serving.conversation import AUDIO

DELAY = 1  # frames before the first answer of the small model
AHEAD = 20  # frames that are sent before the first of them is answered


def packets(codec: str, sound: np.ndarray) -> Iterator[bytes]:
    """A voice's messages without end; `sound`: float32 `[frames, FRAME]`, said again and again."""
    if codec == "pcm":
        frames = (sound.clip(-1, 1) * 32767).astype("<i2")
        yield from itertools.cycle(AUDIO + frame.tobytes() for frame in frames)
    writer = sphn.OpusStreamWriter(RATE)
    for frame in itertools.cycle(sound):
        yield AUDIO + writer.append_pcm(frame)


@asynccontextmanager
async def ahead(client: Client, messages: Iterable[bytes]) -> AsyncIterator[Callable[[], None]]:
    """Send messages meanwhile, `AHEAD` at first; yields what is to be called to send one more."""
    room = asyncio.Semaphore(AHEAD)

    async def say() -> None:
        for message in messages:
            await room.acquire()
            await client.send(message)

    saying = asyncio.ensure_future(say())
    try:
        yield room.release
    finally:
        saying.cancel()
        await asyncio.gather(saying, return_exceptions=True)
