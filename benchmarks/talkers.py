"""Clients that talk to a server at the pace of speech, and note how long each answer took."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp
import numpy as np
import sphn
from strangers import TOKEN

RATE, FRAME, FRAME_S = 24_000, 1920, 0.08
DELAY = 1  # frames before the first answer


async def talk(port: int, number: int, over: Any, waited: list[tuple[float, float]]) -> None:
    """Talk until it is over; notes when each answered frame was due to be said, and its wait."""
    sound = np.random.default_rng(number).normal(0, 0.1, FRAME).astype(np.float32)
    writer, reader = sphn.OpusStreamWriter(RATE), sphn.OpusStreamReader(RATE)
    url, headers = f"http://127.0.0.1:{port}/api/chat", {"Authorization": f"Bearer {TOKEN}"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.ws_connect(url) as websocket,
    ):
        began, samples = time.monotonic() + number * 0.013, 0

        async def say() -> None:
            at = 0
            while not over.is_set():
                await asyncio.sleep(began + at * FRAME_S - time.monotonic())
                await websocket.send_bytes(b"\x01" + writer.append_pcm(sound))
                at += 1
            await websocket.close()

        saying = asyncio.ensure_future(say())
        async for message in websocket:
            if message.data[:1] == b"\x01":
                samples += len(reader.append_bytes(message.data[1:]))
                said = began + (round(samples / FRAME) - 1 + DELAY) * FRAME_S
                waited.append((said, time.monotonic() - said))
        assert over.is_set(), f"a client that talks was closed with {websocket.close_code}"
        await saying


def talkers(port: int, count: int, over: Any, pipe: Any) -> None:
    """All that talk; a process."""

    async def together() -> list[tuple[float, float]]:
        waited: list[tuple[float, float]] = []
        await asyncio.gather(*(talk(port, number, over, waited) for number in range(count)))
        return waited

    pipe.send(asyncio.run(together()))
