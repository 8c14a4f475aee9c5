"""The attention core at Moshi 7B's widths, for the benchmarks that time it.

The core is everything between the in- and the out-projection. Moshi's own and the patched
attention run as they are, float32 on one thread, with stand-ins for both projections: the one hands
out projected frames made beforehand, the other does nothing. The arms take turns, a whole chunk of
consecutive steps each, so that every sample holds one step that publishes a memory version.
Two clocks run: the wall's, and the thread's processor time. On a machine shared with others a long
sample is interrupted more surely than a short one, which flatters whatever is compared with it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from common import CONTEXT, DIM, HEADS, transformer
from moshi.modules.streaming import State
from moshi.modules.transformer import StreamingMultiheadAttention
from rich.progress import track
from torch import Tensor, nn

import ttt_cache
from ttt_cache.bench.check import off
from ttt_cache.bench.core import fill_ring
from ttt_cache.cache import HierarchicalCache
from ttt_cache.patched import PatchedState
from ttt_cache.targets import attention_of

CHUNK = 8
CLOCKS = {"wall": time.perf_counter_ns, "processor": time.thread_time_ns}
PIECE = 250  # frames of one call that fills a window and its memory
TOLERANCE = 1e-5  # of the output's scale, docs/semantics.md
Samples = dict[str, dict[str, list[float]]]


class Given(nn.Module):
    """Stands in for the in-projection: hands out `[B, T, 3 * DIM]` frames in order."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[Tensor] = []

    def forward(self, _: Tensor) -> Tensor:
        return self.frames.pop()


class Arm:
    """One attention, streaming, without its projections; stock without settings."""

    def __init__(self, settings: dict[str, Any], batch_size: int) -> None:
        model = transformer(DIM, HEADS, 1, hidden=64)
        handle = ttt_cache.patch(model, **settings) if settings else None
        self.caches = handle.caches if handle else {}
        self.attention: StreamingMultiheadAttention = attention_of(model, 0)
        # Moshi reads the format of its ring off the real projection.
        self.attention.streaming_forever(batch_size)
        self.given = Given()
        self.attention.in_projs[0], self.attention.out_projs[0] = self.given, nn.Identity()

    @property
    def cache(self) -> HierarchicalCache:
        """That of the patched layer."""
        return self.caches[0]

    def run(self, hidden: Tensor, projected: Tensor) -> tuple[list[Tensor], tuple[int, ...]]:
        """Calls on `[K, B, T, DIM]` and `[K, B, T, 3 * DIM]`: outputs, ns of all K by clock."""
        self.given.frames = list(projected.unbind())[::-1]
        return timed(lambda x: self.attention(x, x, x), hidden)

    @property
    def state(self) -> State:
        """The attention's streaming state."""
        state = self.attention._streaming_state
        assert state is not None
        return state

    def stagger(self) -> None:
        """Let every row go on alone for some steps, so that rows are in all phases of a chunk."""
        executing, ahead = self.state.exec_mask, torch.arange(self.state.batch_size) % CHUNK
        for step in range(CHUNK - 1):
            executing.copy_(ahead > step)
            self.run(*frames(1, self.state.batch_size))
        executing.fill_(True)

    def fill(self) -> None:
        """Put more tokens in than stock Moshi and the arm itself can hold.

        A short window and its memory take them in. A long ring is not stepped through: it is filled
        at random, and its tokens are counted.
        """
        state: Any = self.state
        if not isinstance(state, PatchedState):
            fill_ring(state)
        elif (capacity := state.cache.keys.shape[2]) > PIECE:
            state.cache.keys.normal_()
            state.cache.values.normal_()
            state.cache.count += max(capacity, CONTEXT)
        else:
            for _ in range(CONTEXT // PIECE):
                self.run(*frames(1, state.batch_size, PIECE))


def timed(call: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[list[Tensor], tuple[int, ...]]:
    """What `call` makes of each of the inputs, and the ns of all together by clock."""
    outputs, each = [], inputs.unbind()
    began = [clock() for clock in CLOCKS.values()]
    for x in each:
        outputs.append(call(x))
    ended = [clock() for clock in CLOCKS.values()]
    return outputs, tuple(end - start for start, end in zip(began, ended, strict=True))


def frames(steps: int, batch_size: int, length: int = 1) -> tuple[Tensor, Tensor]:
    shape = (steps, batch_size, length)
    return torch.randn(*shape, DIM), torch.randn(*shape, 3 * DIM)


def worst(figures: Iterable[float]) -> float:
    """The largest; NaN wins."""
    return max(figures, key=lambda figure: (figure != figure, figure))


def compare(arms: dict[str, Arm], steps: int, batch_size: int) -> dict[str, float]:
    """Step all arms; largest difference of each to `stock`, in its scale."""
    apart: dict[str, list[float]] = {name: [] for name in arms if name != "stock"}
    for _ in track(range(steps), f"check, batch {batch_size}"):
        inputs = frames(1, batch_size)
        outputs = {name: arm.run(*inputs)[0][0] for name, arm in arms.items()}
        for name, figures in apart.items():
            figures.append(off(outputs[name], outputs["stock"]))
    return {name: worst(figures) for name, figures in apart.items()}


def require(apart: dict[str, float], what: str) -> None:
    """Stop before anything is timed unless every difference is within the tolerance.

    Raises:
        SystemExit: one is not, or is NaN.
    """
    for name, figure in apart.items():
        if not figure <= TOLERANCE:
            raise SystemExit(
                f"{name} {what}: off by {figure:.3g} of the output's scale, "
                f"allowed {TOLERANCE:g}. Nothing was timed."
            )


class Timed(Protocol):
    """What can be timed: K calls on frames, and their ns by clock."""

    def run(self, hidden: Tensor, projected: Tensor, /) -> tuple[list[Tensor], tuple[int, ...]]: ...


def interleave(arms: Mapping[str, Timed], batch_size: int, repetitions: int) -> Samples:
    """Milliseconds of a step, for every sample of every arm, by clock."""
    names = list(arms)
    samples: Samples = {clock: {name: [] for name in names} for clock in CLOCKS}
    for turn in track(range(-1, repetitions), f"time, batch {batch_size}"):
        inputs = frames(CHUNK, batch_size)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            _, spent = arms[name].run(*inputs)
            if turn >= 0:  # the turn before is for the CPU's caches and the allocator
                for clock, ns in zip(CLOCKS, spent, strict=True):
                    samples[clock][name].append(ns / CHUNK / 1e6)
    return samples


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(ms) for name, ms in samples.items()}


def parse(about: str | None, name: str, batch_sizes: list[int]) -> argparse.Namespace:
    """The options of a benchmark of the core."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=batch_sizes)
    parser.add_argument(
        "--repetitions", type=int, default=45, help="chunks of each arm, at least 15"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(f"out/{name}.json"))
    options = parser.parse_args()
    if options.repetitions < 15:
        parser.error(f"--repetitions must be at least 15, got {options.repetitions}")
    return options
