"""What strangers can do to `ttt-cache serve`: attacks one after the other, while others talk.

    python benchmarks/serve_attack.py --out out/attack

A small random Moshi is served by a process of its own, on the CPU; clients with real Opus talk to
it in another, a frame each 80 ms, and this process attacks, at a lower priority. Printed of each
attack: how its attempts ended, the clients' frames, how many came more than 80 ms after they were
said, the processor time that the machine had left, and memory and files of the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import attacks
import psutil
from common import environment, quiet_process
from held import open_files, resident_mb
from strangers import TOKEN, Target
from talkers import talkers

from ttt_cache.serving.conversation import FRAME_S

ROOT = Path(__file__).parents[1]


def model(folder: Path) -> list[str]:
    """Make a small Moshi; returns the flags that name it."""
    subprocess.run([sys.executable, ROOT / "examples/make_small.py", "--out", folder], check=True)
    flags = ["--hf-repo", "none/needed", "--device", "cpu", "--memory", "cluster"]
    for flag, file in (
        ("--moshi-weight", "model.safetensors"),
        ("--mimi-weight", "mimi.safetensors"),
        ("--tokenizer", "tokenizer.model"),
        ("--config-path", "config.json"),
    ):
        flags += [flag, str(folder / file)]
    return flags


def serve(flags: list[str], port: int, rows: int) -> psutil.Popen:
    """Start the server, and wait until it serves."""
    words = ["serve", "--port", port, "--host", "127.0.0.1", "--rows", rows, "--idle", 8, *flags]
    process = psutil.Popen(
        [sys.executable, "-m", "ttt_cache.cli", *map(str, words)],
        env={**os.environ, "TTT_CACHE_TOKEN": TOKEN},
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if "conversations at http" in line:
            return process
        print(line, end="")
    raise SystemExit("the server did not start")


class Watch:
    """What the server and the machine do in the meantime, and some seconds after an attack."""

    def __init__(self, server: psutil.Process, after: float) -> None:
        self._server, self._after, self.lines = server, after, []

    async def during(self, name: str, attack: Awaitable[Counter[str]]) -> None:
        before, began = self._look(), time.monotonic()
        ended = await attack
        ended_at = time.monotonic()
        await asyncio.sleep(self._after)  # what is left of it is cleared away
        after, seconds = self._look(), time.monotonic() - began
        self.lines.append(
            {
                "attack": name,
                "ended": dict(ended.most_common()),
                "began": began,
                "seconds": round(ended_at - began, 1),
                "idle": (after["idle"] - before["idle"]) / (after["all"] - before["all"]),
                "cores": (after["server"] - before["server"]) / seconds,
                "memory_mb": [before["memory"], after["memory"]],
                "files": [before["files"], after["files"]],
            }
        )
        print(f"{name}: {dict(ended)}")

    def _look(self) -> dict[str, float]:
        machine, server = psutil.cpu_times(), self._server.cpu_times()
        return {
            "idle": machine.idle + machine.iowait,
            "all": sum(machine[:8]),  # those of guests are in the others
            "server": server.user + server.system,
            "memory": round(resident_mb(self._server.pid), 1),
            "files": open_files(self._server.pid),
        }


def finish(lines: list[dict[str, Any]], waited: list[tuple[float, float]]) -> None:
    """Give each attack the frames that were said from its begin to its end."""
    for line in lines:
        end = line["began"] + line["seconds"]
        here = [wait for said, wait in waited if line["began"] <= said < end]
        line["frames"], line["late"] = len(here), sum(wait > FRAME_S for wait in here)
        line["worst_ms"] = round(max(here) * 1e3, 1) if here else None


def markdown(lines: list[dict[str, Any]]) -> str:
    rows = [
        "attack|how it ended|s|frames|late|worst ms|idle|server's cores|MB|files",
        "|".join(["---"] * 10),
    ]
    for line in lines:
        ended = "; ".join(f"{number} {how}" for how, number in line["ended"].items())
        of_machine = f"{line['idle']:.0%}|{line['cores']:.2f}"
        held = "|".join("{} to {}".format(*line[name]) for name in ("memory_mb", "files"))
        talk = f"{line['frames']}|{line['late']}|{line['worst_ms']}"
        rows.append(f"{line['attack']}|{ended}|{line['seconds']}|{talk}|{of_machine}|{held}")
    return "".join(f"|{row}|\n" for row in rows)


async def attack(given: argparse.Namespace, watch: Watch, target: Target) -> None:
    share, hold = given.share, given.hold

    async def nothing() -> Counter[str]:
        await asyncio.sleep(hold / 2)
        return Counter()

    for name, this in (
        ("none", nothing()),
        ("malformed", attacks.malformed(target, int(200 * share))),
        ("oversized", attacks.oversized(target, int(100 * share))),
        ("slow readers", attacks.slow_readers(target, 1.5 * hold)),
        ("half-open", attacks.half_open(target, int(400 * share), hold)),
        ("wrong tokens", attacks.wrong_tokens(target, int(2000 * share))),
        ("attempts when full", attacks.attempts(target, int(10_000 * share))),
        ("none again", nothing()),
    ):
        await watch.during(name, this)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for JSON and table")
    parser.add_argument("--clients", type=int, default=2, help="that talk")
    parser.add_argument("--spare", type=int, default=4, help="rows for those who attack")
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the attempts: smaller is quicker"
    )
    parser.add_argument(
        "--hold", type=float, default=20.0, help="seconds that one goes on who holds out"
    )
    given = parser.parse_args()
    quiet_process()
    given.out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = serve(model(given.out / "model"), port, given.clients + given.spare)
    try:
        spawn = multiprocessing.get_context("spawn")
        over, (here, there) = spawn.Event(), spawn.Pipe()
        process = spawn.Process(target=talkers, args=(port, given.clients, over, there))
        process.start()
        there.close()  # that of this process: if the other ends, `recv` does
        here.recv()
        time.sleep(given.hold / 10)
        os.nice(10)
        watch = Watch(server, given.hold / 10)
        asyncio.run(attack(given, watch, Target(port, given.spare)))
        over.set()
        finish(watch.lines, here.recv())
        process.join()
        server.terminate()
        record = environment(0, "float32") | {"status": server.wait(30), "attacks": watch.lines}
    finally:
        if server.poll() is None:
            server.kill()
    (given.out / "attack.json").write_text(json.dumps(record, indent=2) + "\n")
    (given.out / "attack.md").write_text(markdown(watch.lines))
    print(markdown(watch.lines))


if __name__ == "__main__":
    main()
