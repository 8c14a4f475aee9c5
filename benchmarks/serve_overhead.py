"""What the server of `ttt-cache serve` costs per conversation and frame, the model aside.

    python benchmarks/serve_overhead.py --clients 8 --frames 90000                  # Opus aside too
    python benchmarks/serve_overhead.py --clients 8 --frames 8000 --codec opus      # all in one
    python benchmarks/serve_overhead.py --clients 8 --frames 8000 --codec opus --workers 1

The model is replaced by one that answers each frame with itself, and Opus, unless it is asked for,
by a codec that passes bytes on; all else is the server's: websockets, queues, clock, thread,
metrics. Clients, in a process of their own, send as fast as they are read and check that every
frame comes back once, in order, to the one that sent it; with Opus, that it is byte by byte what a
coder by itself makes of it. Printed: processor time of the server per frame, that of the processes
which code for it, and the server's memory; one JSON file keeps that.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import resource
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from aiohttp import web
from common import environment, publish, quiet_process
from held import resident_mb
from overhead_clients import OPUS_BYTES, clients

from ttt_cache.bench.serve.sound import FRAME, RATE
from ttt_cache.evaluation.lines import Line
from ttt_cache.serving.clock import Clock
from ttt_cache.serving.engine import Answer, FullError
from ttt_cache.serving.host import Host
from ttt_cache.serving.metrics import Metrics
from ttt_cache.serving.pool import Pool
from ttt_cache.serving.talk import Limits
from ttt_cache.serving.web import Web


class Echo:
    """An engine that answers with what it was given, after the time of a model's step."""

    frame_size, mimi = FRAME, SimpleNamespace(sample_rate=RATE)

    def __init__(self, rows: int, step_s: float) -> None:
        self.rows, self._free, self._step_s = rows, list(range(rows)), step_s

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
        time.sleep(self._step_s)
        return {row: Answer(frame, 7) for row, frame in frames.items()}


class Bytes:
    """A codec that costs nothing; what a frame is recognised by is in its first samples."""

    def __init__(self, rate: int, frame_size: int) -> None:
        self._frame_size = frame_size

    async def decode(self, payload: bytes) -> AsyncIterator[np.ndarray]:
        frame = np.zeros(self._frame_size, np.float32)
        frame[: OPUS_BYTES // 4] = np.frombuffer(payload, np.float32)
        yield frame

    async def encode(self, pcm: np.ndarray) -> bytes:
        return pcm[: OPUS_BYTES // 4].tobytes()

    def close(self) -> None:
        pass


async def server(given: argparse.Namespace, frames: int, pipe: Any) -> None:
    """Serve until so many frames are stepped; sends the port, and at the end what that took."""
    pool, rows = Pool(given.workers), given.clients
    await pool.attach()
    codecs = {"opus": Bytes if given.codec == "stub" else pool.opus}
    engine, metrics = Echo(rows, given.step_ms / 1e3), Metrics(rows, 0)
    with ThreadPoolExecutor(1) as thread:
        clock = Clock(engine, metrics, thread)  # type: ignore[arg-type]
        host = Host(engine, clock, metrics, lambda token: "a", codecs=codecs)  # type: ignore[arg-type]
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
                held.append(resident_mb())
        found = {"frames": done, "server_s": time.process_time() - began, "memory_mb": held}
        found["steps"] = metrics.registry.get_sample_value("ttt_cache_step_seconds_count")
        while host.conversations:  # whose last answers are on their way
            await asyncio.sleep(0.1)
        await host.stop()
        stepping.cancel()
        await runner.cleanup()
        pool.close()
        found["workers_s"] = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        pipe.send(found)


def lines_of(found: dict[str, Any]) -> list[Line]:
    frames, held = found["frames"], found["memory_mb"]
    return [
        Line("frames, each answered to its client and in order", frames),
        Line("rows that shared a step, mean", frames / found["steps"]),
        Line("server: processor time of a frame", found["server_s"] / frames * 1e3, "ms"),
        Line("workers: processor time of a frame", found["workers_s"] / frames * 1e3, "ms"),
        Line("server: memory after a tenth", held[0], "MB"),
        Line("server: memory at the end", held[-1], "MB"),
        Line("wall clock", found["seconds"], "s"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--frames", type=int, default=90_000)
    parser.add_argument("--codec", choices=["stub", "opus"], default="stub")
    parser.add_argument("--workers", type=int, default=0, help="that code Opus; 0: the server")
    parser.add_argument("--step-ms", type=float, default=20, help="of the model")
    parser.add_argument("--out", type=Path, default=Path("out/serve_overhead.json"))
    given = parser.parse_args()
    quiet_process()
    here, there = multiprocessing.Pipe()
    frames = given.frames // given.clients * given.clients
    process = multiprocessing.Process(target=lambda: asyncio.run(server(given, frames, there)))
    process.start()
    began = time.perf_counter()
    asyncio.run(clients(here.recv(), given.clients, frames, given.codec))
    found = {"seconds": time.perf_counter() - began, **here.recv()}
    process.join()
    settings = {name: value for name, value in vars(given).items() if name != "out"}
    record = environment(0, "float32")
    publish("serve_overhead", given.out, record, settings, lines_of(found), log=found)


if __name__ == "__main__":
    main()
