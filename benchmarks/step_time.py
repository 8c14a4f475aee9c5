"""Time of one attention core at Moshi 7B's widths: stock with a full ring, patched, window only.

The core is everything between the in- and the out-projection. Moshi's own and the patched
attention run as they are, float32 on one thread, with stand-ins for both projections: the one hands
out projected frames made beforehand, the other does nothing. The arms take turns, a whole chunk of
consecutive steps each, so that every sample holds one step that publishes a memory version.
Two clocks run: the wall's, and the thread's processor time. On a machine shared with others a long
sample is interrupted more surely than a short one, which flatters whatever is compared with it.
No speed is printed unless the patched cores equal stock before their first eviction.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import CONTEXT, Line, environment, publish, quiet_process, transformer
from moshi.modules.transformer import StreamingMultiheadAttention
from rich.progress import track
from torch import Tensor, nn

import ttt_cache
from ttt_cache.targets import attention_of

DIM, HEADS, RECENT, CHUNK = 4096, 32, 100, 8
SETTINGS: dict[str, dict[str, Any]] = {
    "stock": {},
    "patched": {"recent": RECENT, "chunk": CHUNK},
    "window": {"recent": RECENT, "memory": "none"},
}
CLOCKS = {"wall": time.perf_counter_ns, "processor": time.thread_time_ns}
PIECE = 250  # frames of one call that fills a window and its memory
TOLERANCE = 1e-5  # of the output's scale, docs/semantics.md


class Given(nn.Module):
    """Stands in for the in-projection: hands out `[B, T, 3 * DIM]` frames in order."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[Tensor] = []

    def forward(self, _: Tensor) -> Tensor:
        return self.frames.pop()


class Arm:
    """One attention, streaming, without its projections."""

    def __init__(self, settings: dict[str, Any], batch_size: int) -> None:
        model = transformer(DIM, HEADS, 1, hidden=64)
        if settings:
            ttt_cache.patch(model, **settings)
        self.attention: StreamingMultiheadAttention = attention_of(model, 0)
        # Moshi reads the format of its ring off the real projection.
        self.attention.streaming_forever(batch_size)
        self.given = Given()
        self.attention.in_projs[0], self.attention.out_projs[0] = self.given, nn.Identity()

    def run(self, hidden: Tensor, projected: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Calls on `[K, B, T, DIM]` and `[K, B, T, 3 * DIM]`: last output, ns of all K by clock."""
        self.given.frames = list(projected.unbind())[::-1]
        y, frames = hidden, hidden.unbind()
        began = [clock() for clock in CLOCKS.values()]
        for x in frames:
            y = self.attention(x, x, x)
        ended = [clock() for clock in CLOCKS.values()]
        return y, tuple(end - start for start, end in zip(began, ended, strict=True))

    def fill_ring(self, tokens: int) -> None:
        """Moshi's ring as after `tokens` random frames, without stepping through them."""
        state = self.attention._streaming_state
        assert state is not None and state.kv_cache is not None
        state.kv_cache.cache.normal_()
        state.kv_cache.end_offset.fill_(tokens)
        state.offset.fill_(tokens)


def frames(steps: int, batch_size: int, length: int = 1) -> tuple[Tensor, Tensor]:
    shape = (steps, batch_size, length)
    return torch.randn(*shape, DIM), torch.randn(*shape, 3 * DIM)


def check(arms: dict[str, Arm], batch_size: int) -> float:
    """Step all arms up to the first eviction; largest difference to stock, in its scale.

    Raises:
        SystemExit: an arm is not stock; there is nothing to time.
    """
    worst = 0.0
    for _ in track(range(RECENT), f"check, batch {batch_size}"):
        inputs = frames(1, batch_size)
        outputs = {name: arm.run(*inputs)[0] for name, arm in arms.items()}
        stock = outputs.pop("stock")
        apart = [float((y - stock).abs().max() / stock.abs().max()) for y in outputs.values()]
        worst = max([worst, *apart], key=lambda figure: (figure != figure, figure))  # NaN wins
    if not worst <= TOLERANCE:
        raise SystemExit(
            f"patched is not stock before the first eviction at batch {batch_size}: "
            f"off by {worst:.3g} of the output's scale, allowed {TOLERANCE:g}. Nothing was timed."
        )
    return worst


def measure(batch_size: int, repetitions: int) -> dict[str, Any]:
    """Milliseconds of a step for every sample of every arm, after the check."""
    arms = {name: Arm(settings, batch_size) for name, settings in SETTINGS.items()}
    worst = check(arms, batch_size)
    for name, arm in arms.items():
        if name == "stock":
            arm.fill_ring(RECENT + CONTEXT)
            continue
        for _ in range(CONTEXT // PIECE):
            arm.run(*frames(1, batch_size, PIECE))
    names = list(arms)
    samples = {clock: {name: [] for name in names} for clock in CLOCKS}
    for turn in track(range(-1, repetitions), f"time, batch {batch_size}"):
        inputs = frames(CHUNK, batch_size)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            _, spent = arms[name].run(*inputs)
            if turn >= 0:  # the turn before is for the CPU's caches and the allocator
                for clock, ns in zip(CLOCKS, spent, strict=True):
                    samples[clock][name].append(ns / CHUNK / 1e6)
    return {"batch_size": batch_size, "off_before_eviction": worst, "samples_ms": samples}


def lines_of(result: dict[str, Any]) -> list[Line]:
    batch = f"batch {result['batch_size']}"
    off = result["off_before_eviction"]
    lines = [Line(f"{batch}: off before eviction", off, "of scale", TOLERANCE)]
    for clock, samples in result["samples_ms"].items():
        medians = {name: statistics.median(ms) for name, ms in samples.items()}
        lines += [
            Line(f"{batch}, {clock}: {name}", ms, "ms a step") for name, ms in medians.items()
        ]
        for name in ("patched", "window"):
            ratio = medians[name] / medians["stock"]
            lines.append(Line(f"{batch}, {clock}: {name} / stock", ratio))
    return lines


@torch.no_grad()
def main() -> None:
    quiet_process()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument(
        "--repetitions", type=int, default=45, help="chunks of each arm, at least 15"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/step_time.json"))
    options = parser.parse_args()
    if options.repetitions < 15:
        parser.error(f"--repetitions must be at least 15, got {options.repetitions}")
    record = environment(options.seed, "float32")
    torch.manual_seed(options.seed)
    results = [measure(batch, options.repetitions) for batch in options.batch_sizes]
    lines = [line for result in results for line in lines_of(result)]
    settings = {"arms": SETTINGS, "repetitions": options.repetitions, "steps_per_sample": CHUNK}
    publish("step_time", options.out, record, settings, lines, results=results)


if __name__ == "__main__":
    main()
