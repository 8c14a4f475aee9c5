"""Clients that know what they are to be answered: for serve_overhead."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import aiohttp
import numpy as np
import sphn

from ttt_cache.serving.opus import Opus

RATE, FRAME = 24_000, 1920
OPUS_BYTES = 300  # of a frame
AHEAD = 20  # frames that are sent before the first is answered
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


async def client(port: int, messages: Iterable[tuple[bytes, bytes]]) -> None:
    sending, expected = itertools.tee(messages)
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"http://localhost:{port}/api/chat") as socket,
    ):
        assert await socket.receive_bytes() == b"\x00"
        ahead = asyncio.Semaphore(AHEAD)

        async def say() -> None:
            for packet, _ in sending:
                await ahead.acquire()
                await socket.send_bytes(b"\x01" + packet)

        saying = asyncio.ensure_future(say())
        for at, (_, right) in enumerate(expected):
            while (message := await socket.receive_bytes())[:1] != b"\x01":
                pass
            assert message[1:] == right, f"frame {at} was answered with that of another"
            ahead.release()
        await saying


async def clients(port: int, count: int, frames: int, codec: str) -> None:
    each = frames // count
    if codec == "stub":
        said = [stub_messages(number, each) for number in range(count)]
    else:
        voices = [await opus_messages(number, each) for number in range(min(count, VOICES))]
        said = [voices[number % len(voices)] for number in range(count)]
    await asyncio.gather(*(client(port, messages) for messages in said))
