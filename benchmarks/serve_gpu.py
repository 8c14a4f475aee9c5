"""Conversations held in real time by a Moshi 7B with random weights, stock and patched.

    python benchmarks/serve_gpu.py

The server of `ttt-cache serve`, on weights drawn at random, in this process; the clients of
`ttt-cache bench serve`, in others. A server has as many rows as it has clients, as a step costs all
rows that there are: each level is a server of its own, on the same weights. An arm ends with the
first level that is not held, or does not fit. One JSON file keeps all, written after each level.
`--small` tries the script itself on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_frame
import torch
from common import environment, publish
from moshi.models.compression import MimiModel
from moshi.models.lm import LMGen, LMModel
from moshi.models.loaders import _mimi_config, get_mimi
from serve_level import Level, measure

from ttt_cache.bench.serve.ramp import most_held
from ttt_cache.evaluation.lines import Line
from ttt_cache.serving.clock import model_thread
from ttt_cache.serving.engine import Engine
from ttt_cache.serving.listen import bound
from ttt_cache.serving.pool import Pool, workers_for
from ttt_cache.serving.run import Options, Server

SETTINGS: dict[str, Any] = {"recent": 100, "virtual": 10}
LEVELS = {"stock": (8, 16, 32, 48, 64), "patched": (8, 32, 64, 96, 128, 256, 512, 1024)}
SMALL: dict[str, Any] = {
    "dim": 64, "num_heads": 2, "num_layers": 2, "context": 250, "depformer_dim": 32,
    "depformer_dim_feedforward": 64, "depformer_num_heads": 1, "depformer_num_layers": 1,
}  # fmt: skip


@dataclass
class Models:
    """Of every level: the language models by arm, on the same weights, and one Mimi."""

    arms: dict[str, LMModel]
    mimi: MimiModel
    device: torch.device

    @classmethod
    def at_random(cls, device: torch.device, dtype: torch.dtype, small: bool) -> Models:
        arms = gpu_frame.models(device, dtype, SETTINGS, **(SMALL if small else {}))
        mimi = get_mimi(None, _narrow_mimi() if small else None, device)
        for name, held in mimi.named_buffers():
            if name.endswith("embedding_sum"):
                held.normal_()  # else every code word is the same, and so is every sound
        return cls(arms, mimi, device)

    def server(self, arm: str, rows: int) -> Server:
        """A server of so many rows that does not listen yet, ready to speak.

        Raises:
            torch.cuda.OutOfMemoryError: it does not fit.
        """
        thread = model_thread(str(self.device))

        def make() -> Engine:
            engine = Engine(LMGen(self.arms[arm], support_out_of_sync=True), self.mimi, rows)
            engine.warm_up()
            return engine

        try:
            engine = thread.submit(make).result()
        except BaseException:
            thread.shutdown()
            raise
        sockets, pool = bound("127.0.0.1", 0), Pool(workers_for(rows))
        options = Options(rows, "127.0.0.1", sockets[0].getsockname()[1])
        return Server(options, thread, engine, lambda token: "a", None, sockets, None, pool=pool)

    def end(self) -> None:
        """Free what the conversations of a level held."""
        for model in (*self.arms.values(), self.mimi):
            gpu_frame.end(model)
        gc.collect()
        torch.cuda.empty_cache()  # nothing where CUDA was never used


def _narrow_mimi() -> dict[str, Any]:
    """Mimi's own config but for what takes its time."""
    few = {"seanet": {"n_filters": 4}, "transformer": {"num_layers": 1}}
    return _mimi_config | {part: _mimi_config[part] | changed for part, changed in few.items()}


def levels(models: Models, arm: str, options: argparse.Namespace, until: float) -> Iterator[Level]:
    """Each level of an arm as it is measured, until one is not held or no time is left."""
    for rows in options.clients or LEVELS[arm]:
        if time.monotonic() > until:
            return
        try:
            level = measure(models.server(arm, rows), options)
        except torch.cuda.OutOfMemoryError:
            yield {"clients": rows, "held": False, "reasons": ["its state does not fit"]}
            return
        finally:
            models.end()
        yield level
        if not level["held"]:
            return


def lines_of(found: dict[str, list[Level]]) -> list[Line]:
    lines = []
    for arm, done in found.items():
        held = most_held({level["clients"]: level["held"] for level in done})
        lines.append(Line(f"{arm}: conversations in real time", held))
        for level in done:
            about = "; ".join(level["reasons"])
            name, late = f"{arm}: p99 of {level['clients']}", level.get("p99_ms")
            lines.append(Line(name, late, "ms", about=about))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--arm", nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--clients", nargs="+", type=int, help="levels, upwards, of every arm")
    parser.add_argument("--codec", default="opus", help="opus, or pcm: the model's own limit")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--warm-up", type=float, default=10.0, help="fills the windows")
    parser.add_argument("--minutes", type=float, default=12.0, help="no level begins later")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/serve_gpu.json"))
    options = parser.parse_args()
    until = time.monotonic() + options.minutes * 60
    if not (options.small or torch.cuda.is_available()):
        raise SystemExit("benchmarks/serve_gpu.py needs an NVIDIA GPU; --small tries it on a CPU")
    where, dtype = ("cpu", torch.float32) if options.small else ("cuda", torch.bfloat16)
    torch.manual_seed(options.seed)
    record = environment(options.seed, str(dtype).removeprefix("torch.")) | {"environment": {}}
    names = ("codec", "seconds", "warm_up", "small")
    settings = SETTINGS | {name: getattr(options, name) for name in names}
    models = Models.at_random(torch.device(where), dtype, options.small)
    found: dict[str, list[Level]] = {}
    for arm in options.arm:
        found[arm] = []
        for level in levels(models, arm, options, until):
            found[arm].append(level)
            publish("serve_gpu", options.out, record, settings, lines_of(found), levels=found)


if __name__ == "__main__":
    main()
