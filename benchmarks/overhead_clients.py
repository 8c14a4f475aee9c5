"""Clients that know what they are to be answered: for serve_overhead."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import aiohttp
import numpy as np
import sphn
from voices import ahead

from ttt_cache.bench.serve.client import Client
from ttt_cache.bench.serve.plan import make_plan
from ttt_cache.bench.serve.sound import FRAME, RATE
from ttt_cache.serving.conversation import AUDIO
from ttt_cache.serving.opus import Opus

OPUS_BYTES = 300  # of a frame
VOICES = 4
SPEECH = Path(__file__).parents[1] / "examples" / "speech.wav"


def stub_messages(number: int, frames: int) -> Iterator[tuple[bytes, bytes]]:
    """What a client sends, each with what it is to be answered: the same, which is its own."""
    payload = np.zeros(OPUS_BYTES // 4, np.float32)
    for at in range(frames):
        payload[:2] = number, at
        yield payload.tobytes(), payload.tobytes()


async def opus_messages(number: int, frames: int) -> list[tuple[bytes, bytes]]:
    """The same of a voice, answered by a coder that has nothing else to do."""
    said = np.roll(sphn.read(str(SPEECH))[0][0], 7001 * number)
    writer, alone, messages = sphn.OpusStreamWriter(RATE), Opus(RATE, FRAME), []
    for sound in np.resize(said, (frames, FRAME)):
        packet = writer.append_pcm(sound)
        (frame,) = [frame async for frame in alone.decode(packet)]
        messages.append((packet, await alone.encode(frame)))
    return messages


async def converse(port: int, messages: Iterable[tuple[bytes, bytes]]) -> None:
    sending, expected = itertools.tee(messages)
    async with aiohttp.ClientSession() as session:
        client = await Client.connect(session, make_plan(f"http://localhost:{port}"))
        async with ahead(client, (AUDIO + packet for packet, _ in sending)) as answered:
            for at, (_, right) in enumerate(expected):
                while (message := await client.receive())[:1] != AUDIO:
                    pass
                assert message[1:] == right, f"frame {at} was answered with that of another"
                answered()
        await client.close()


async def clients(port: int, count: int, frames: int, codec: str) -> None:
    each = frames // count
    if codec == "stub":
        said = [stub_messages(number, each) for number in range(count)]
    else:
        voices = [await opus_messages(number, each) for number in range(min(count, VOICES))]
        said = [voices[number % len(voices)] for number in range(count)]
    await asyncio.gather(*(converse(port, messages) for messages in said))
