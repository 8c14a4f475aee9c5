"""What the server of `ttt-cache serve` costs per conversation and frame, model and Opus aside.

    python benchmarks/serve_overhead.py --clients 8 --frames 90000

The model is replaced by one that answers each frame with itself, and Opus by a codec that passes
bytes on; all else is the server's: websockets, queues, clock, thread, metrics. Clients, in a
process of their own, send as fast as they are read and check that every frame comes back once, in
order, to the one that sent it. Printed: processor time of the server per frame, and its memory over
time.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import numpy as np
from aiohttp import web

from ttt_cache.serving.clock import Clock
from ttt_cache.serving.codec import CODECS
from ttt_cache.serving.engine import Answer, FullError
from ttt_cache.serving.host import Host
from ttt_cache.serving.metrics import Metrics
from ttt_cache.serving.talk import Limits
from ttt_cache.serving.web import Web

FRAME, OPUS_BYTES, AHEAD = 1920, 300, 20


class Echo:
    """An engine that answers with what it was given."""

    frame_size, mimi = FRAME, SimpleNamespace(sample_rate=24_000)

    def __init__(self, rows: int) -> None:
        self.rows, self._free = rows, list(range(rows))

    def state_bytes(self) -> int:
        return 0

    @property
    def free(self) -> int:
        return len(self._free)

    def join(self) -> int:
        if not self._free:
            raise FullError
        return self._free.pop()

    def leave(self, row: int) -> None:
        self._free.append(row)

    def step(self, frames: dict[int, np.ndarray]) -> dict[int, Answer]:
        return {row: Answer(frame, 7) for row, frame in frames.items()}


class Bytes:
    """A codec that costs nothing; what a frame is recognised by is in its first samples."""

    def __init__(self, rate: int, frame_size: int) -> None:
        self._frame_size = frame_size

    def decode(self, payload: bytes) -> Iterator[np.ndarray]:
        frame = np.zeros(self._frame_size, np.float32)
        frame[: OPUS_BYTES // 4] = np.frombuffer(payload, np.float32)
        yield frame

    def encode(self, pcm: np.ndarray) -> bytes:
        return pcm[: OPUS_BYTES // 4].tobytes()


def memory() -> float:
    """Megabytes that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


async def server(rows: int, frames: int, pipe: Any) -> None:
    CODECS["opus"] = Bytes
    engine, metrics = Echo(rows), Metrics(rows, 0)
    with ThreadPoolExecutor(1) as thread:
        clock = Clock(engine, metrics, thread)  # type: ignore[arg-type]
        host = Host(engine, clock, metrics, lambda token: "a")  # type: ignore[arg-type]
        runner = web.AppRunner(Web(host, Limits()).application(), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "localhost", 0).start()
        stepping = asyncio.ensure_future(clock.run())
        pipe.send(runner.addresses[0][1])
        done, held, began = 0, [], time.process_time()
        while done < frames:
            await asyncio.sleep(0.2)
            done = int(metrics.registry.get_sample_value("ttt_cache_frames_total") or 0)
            if done >= frames * (len(held) + 1) / 10:
                held.append(round(memory(), 1))
        each = (time.process_time() - began) / done
        steps = metrics.registry.get_sample_value("ttt_cache_step_seconds_count")
        print(f"{done} frames in {steps:.0f} steps: {each * 1e3:.3f} ms of processor time each")
        print(f"memory in MB after each tenth: {held}")
        await host.stop()
        stepping.cancel()
        await runner.cleanup()


async def client(port: int, number: int, frames: int) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(f"http://localhost:{port}/api/chat") as socket,
    ):
        assert await socket.receive_bytes() == b"\x00"
        ahead, payload = asyncio.Semaphore(AHEAD), np.zeros(OPUS_BYTES // 4, np.float32)

        async def say() -> None:
            for at in range(frames):
                await ahead.acquire()
                payload[:2] = number, at
                await socket.send_bytes(b"\x01" + payload.tobytes())

        saying, heard = asyncio.ensure_future(say()), 0
        while heard < frames:
            message = await socket.receive_bytes()
            if message[:1] == b"\x01":
                got = np.frombuffer(message[1:], np.float32)[:2].tolist()
                assert got == [number, heard], f"client {number} got {got} for frame {heard}"
                heard += 1
                ahead.release()
        await saying


async def clients(port: int, count: int, frames: int) -> None:
    await asyncio.gather(*(client(port, number, frames // count) for number in range(count)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--frames", type=int, default=90_000)
    given = parser.parse_args()
    here, there = multiprocessing.Pipe()
    frames = given.frames // given.clients * given.clients
    process = multiprocessing.Process(
        target=lambda: asyncio.run(server(given.clients, frames, there))
    )
    process.start()
    began = time.perf_counter()
    asyncio.run(clients(here.recv(), given.clients, frames))
    print(f"every frame came back to its client, in order, in {time.perf_counter() - began:.0f} s")
    process.join()


if __name__ == "__main__":
    main()
