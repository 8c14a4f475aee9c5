"""Two hours of eight conversations at full speed through the whole of `ttt-cache serve`.

    python benchmarks/serve_soak.py                       # 90,000 frames each, about half an hour
    python benchmarks/serve_soak.py --frames 2000         # a look

The server, in a process of its own, has a small random Moshi and Mimi (float32, greedy, a memory
that says something) and saves sessions. Eight clients join one after the other; every two of them
say the same, so that they must be answered alike; half send Opus, half samples. Shown: memory and
file descriptors of the server's processes do not grow; no frame is lost or doubled; every message
is the twin's, byte by byte, though the twins are in other rows and out of step.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import resource
import socket
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from common import environment, publish, quiet_process
from held import descendants, open_files, resident_mb
from rich.progress import Progress
from soak_clients import Crowd
from soak_lines import lines_of, markdown
from soak_server import make, serve
from voices import DELAY

from ttt_cache.evaluation.lines import Line

CODECS = ["opus", "pcm", "opus", "pcm"]  # of the pairs
LOOKS = 100  # at the memory
START_S = 120.0


def held(server: int) -> dict[str, float]:
    """Megabytes and file descriptors of the server, and of the processes that it started."""
    workers = descendants(server)
    return {
        "server_mb": resident_mb(server),
        "workers_mb": sum(map(resident_mb, workers)),
        "workers": len(workers),
        "files": sum(map(open_files, [server, *workers])),
    }


async def measure(crowd: Crowd, server: int) -> dict[str, Any]:
    """Let them talk; what the server held meanwhile, and its own metrics at the end."""
    await _ready(crowd.url)
    whole, looks = len(crowd.talks) * (crowd.frames - DELAY), []
    talking, began = asyncio.ensure_future(crowd.talk()), time.monotonic()
    with Progress() as progress:
        task = progress.add_task("frames", total=whole)
        while not talking.done():
            await asyncio.wait([talking], timeout=0.5)
            progress.update(task, completed=crowd.answered)
            if crowd.answered >= whole * (len(looks) + 1) / LOOKS:
                looks.append({"answered": crowd.answered, **held(server)})
                if len(looks) % 10 == 0:
                    progress.console.print(f"{time.monotonic() - began:,.0f} s: {looks[-1]}")
    async with aiohttp.ClientSession() as session, session.get(f"{crowd.url}/metrics") as response:
        metrics = dict(line.rsplit(" ", 1) for line in (await response.text()).splitlines())
    return {"seconds": talking.result(), "looks": looks, "metrics": metrics}


async def _ready(url: str) -> None:
    async with asyncio.timeout(START_S), aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(f"{url}/health"):
                    return
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.2)


def run(frames: int, seed: int) -> tuple[list[Line], dict[str, Any]]:
    """The lines, and details for the JSON."""
    rows = 2 * len(CODECS)
    with tempfile.TemporaryDirectory() as name, socket.socket() as free:
        folder = Path(name)
        sounds = make(folder, seed)
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        most = min(400, frames // 2)  # or the later ones would wait for ever
        apart = np.random.default_rng(seed).integers(20, most, rows - 1).cumsum()
        starts = [0, *apart.tolist()]
        crowd = Crowd(f"http://localhost:{port}", frames, sounds, CODECS, starts)
        context = multiprocessing.get_context("spawn")
        server = context.Process(target=serve, args=(folder, port, rows, seed))
        server.start()
        try:
            assert server.pid is not None
            log = asyncio.run(measure(crowd, server.pid))
        finally:
            server.terminate()
            server.join()
        log["status"] = server.exitcode
    log["talks"] = [asdict(talk) for talk in crowd.talks]
    log["twins"] = [{**asdict(t), "unmatched": len(t.unmatched)} for t in crowd.twins]
    return lines_of(crowd, log), log


def main() -> None:
    quiet_process()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=90_000, help="of each of the 8 clients")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/serve_soak.json"))
    options = parser.parse_args()
    if options.frames < 50:
        parser.error(f"--frames must be at least 50, got {options.frames}")
    began = time.process_time()
    lines, log = run(options.frames, options.seed)
    log["clients_cpu_s"] = time.process_time() - began
    log["server_cpu_s"] = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    settings = {"codecs": CODECS, "frames": options.frames}
    publish(
        "serve_soak", options.out, environment(options.seed, "float32"), settings, lines, log=log
    )
    options.out.with_suffix(".md").write_text(markdown(lines))


if __name__ == "__main__":
    main()
