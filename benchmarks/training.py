"""Forward and backward of one attention core at Moshi 7B's widths: stock, patched, window only.

The core is everything between the in- and the out-projection (`core.py`), float32 on one thread,
batch 1, one sequence without state: what a training step does in each layer. Stock is Moshi's own
attention with its dense mask of T x T. Gradients go to the projected queries, keys and values, to
the hidden states and to the adapter.

A case is `FRAMES:HEADS`. With fewer than 32 heads the layer is a slice of a Moshi 7B layer: its
hidden states are as wide as its heads together, and its memory is the whole one (4 heads of 64).

Time: the arms take turns in one process; wall clock and the thread's processor time.

Memory: what torch has allocated at the worst moment of forward and backward, by its profiler's
record of every allocation. The inputs, the gradient by the output and the weights, which exist
before, are not in it; the gradients are. Unlike the process's resident size it does not depend on
what the allocator of the C library gives back.

Nothing is timed unless outputs and gradients of the patched cores equal stock's as long as they
evict nothing, and unless at the length of the case gradients reach every input and weight.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import HEADS, environment, publish, quiet_process, transformer
from core import CHUNK, CLOCKS, TOLERANCE, Given, Samples, medians, off, require, worst
from moshi.modules.transformer import StreamingMultiheadAttention
from peak import peak_bytes
from rich.progress import track
from torch import Tensor, nn

import ttt_cache
from ttt_cache.evaluation.lines import Line
from ttt_cache.targets import attention_of

RECENT, WIDTH = 100, 128
SETTINGS: dict[str, dict[str, Any]] = {
    "stock": {},
    "patched": {"recent": RECENT, "chunk": CHUNK},
    "window": {"recent": RECENT, "memory": "none"},
}
TARGETS = {(3000, 32): 0.45, (12000, 4): 0.15}  # of patched / stock
MEMORY_TARGET = 1.0


class Inputs(NamedTuple):
    """Of one call: hidden states, projected frames, and the gradient by the output."""

    hidden: Tensor
    projected: Tensor
    by_output: Tensor

    @classmethod
    def draw(cls, length: int, dim: int) -> Inputs:
        hidden, projected, by_output = (torch.randn(1, length, n * dim) for n in (1, 3, 1))
        return cls(hidden.requires_grad_(), projected.requires_grad_(), by_output)


class Arm:
    """One attention without its projections; stock without settings."""

    def __init__(self, settings: dict[str, Any], heads: int) -> None:
        model = transformer(heads * WIDTH, heads, 1, hidden=64)
        handle = ttt_cache.patch(model, **settings) if settings else None
        self.adapter = dict(handle.caches[0].named_parameters()) if handle else {}
        # How many frames are seen as stock sees them.
        self.exact = handle.caches[0].window.capacity if handle else None
        self.attention: StreamingMultiheadAttention = attention_of(model, 0)
        self.given = Given()
        self.attention.in_projs[0], self.attention.out_projs[0] = self.given, nn.Identity()

    def train(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor | None], dict[str, int]]:
        """Forward and backward: output, gradients by name, nanoseconds by clock."""
        x, self.given.frames = inputs.hidden, [inputs.projected]
        leaves = {"hidden": x, "projected": inputs.projected, **self.adapter}
        began = {name: clock() for name, clock in CLOCKS.items()}
        output = self.attention(x, x, x)
        found = torch.autograd.grad(
            output, list(leaves.values()), inputs.by_output, allow_unused=True
        )
        spent = {name: clock() - began[name] for name, clock in CLOCKS.items()}
        return output.detach(), dict(zip(leaves, found, strict=True)), spent


def check_exact(arms: dict[str, Arm], heads: int) -> float:
    """Outputs and gradients as stock's while nothing is evicted; the largest difference.

    Raises:
        SystemExit: they are not.
    """
    apart = {}
    for name, arm in arms.items():
        if arm.exact is None:
            continue
        inputs = Inputs.draw(arm.exact, heads * WIDTH)
        output, gradients, _ = arm.train(inputs)
        expected, theirs, _ = arms["stock"].train(inputs)
        apart[f"{name}'s output"] = off(output, expected)
        mine, stock = gradients["projected"], theirs["projected"]
        assert mine is not None and stock is not None
        for i, part in enumerate(("queries", "keys", "values")):
            one, other = mine.chunk(3, dim=-1)[i], stock.chunk(3, dim=-1)[i]
            apart[f"{name}'s gradient by {part}"] = off(one, other)
    require(apart, "is not stock's before the first eviction")
    return worst(apart.values())


def check_reach(name: str, arm: Arm, inputs: Inputs) -> None:
    """Gradients reach what they must, and are finite.

    Raises:
        SystemExit: they do not.
    """
    _, gradients, _ = arm.train(inputs)
    whole = {"projected": gradients["projected"]}
    if arm.adapter:
        whole = gradients
    for part, gradient in whole.items():
        if gradient is None or not gradient.isfinite().all() or not gradient.any():
            raise SystemExit(f"{name}: no finite gradient reaches {part}. Nothing was timed.")


def interleave(arms: dict[str, Arm], length: int, dim: int, repetitions: int) -> Samples:
    """Milliseconds of every sample of every arm, by clock."""
    names = list(arms)
    samples: Samples = {clock: {name: [] for name in names} for clock in CLOCKS}
    for turn in track(range(-1, repetitions), f"time, {length} frames"):
        inputs, first = Inputs.draw(length, dim), turn % len(names)
        for name in names[first:] + names[:first]:
            _, _, spent = arms[name].train(inputs)
            if turn >= 0:  # the turn before is for the allocator
                for clock, ns in spent.items():
                    samples[clock][name].append(ns / 1e6)
    return samples


def measure(length: int, heads: int, repetitions: int) -> dict[str, Any]:
    arms = {name: Arm(settings, heads) for name, settings in SETTINGS.items()}
    apart, dim = check_exact(arms, heads), heads * WIDTH
    inputs = Inputs.draw(length, dim)
    for name, arm in arms.items():
        check_reach(name, arm, inputs)
    peaks = {name: peak_bytes(lambda arm=arm: arm.train(inputs)) for name, arm in arms.items()}
    samples = interleave(arms, length, dim, repetitions)
    case = {"frames": length, "heads": heads, "repetitions": repetitions}
    return {**case, "off": apart, "peak_bytes": peaks, "samples_ms": samples}


def lines_of(result: dict[str, Any]) -> list[Line]:
    length, heads, peaks = result["frames"], result["heads"], result["peak_bytes"]
    case, target = f"{length} frames, {heads} heads", TARGETS.get((length, heads))
    lines = [Line(f"{case}: off before eviction", result["off"], "of scale", TOLERANCE)]
    for clock, samples in result["samples_ms"].items():
        middle = medians(samples)
        lines += [Line(f"{case}, {clock}: {name}", ms, "ms") for name, ms in middle.items()]
        for name in ("patched", "window"):
            at_most = target if name == "patched" else None
            ratio = middle[name] / middle["stock"]
            lines.append(Line(f"{case}, {clock}: {name} / stock", ratio, at_most=at_most))
    lines += [Line(f"{case}, peak: {name}", peak / 1e6, "MB") for name, peak in peaks.items()]
    for name in ("patched", "window"):
        at_most = MEMORY_TARGET if name == "patched" else None
        ratio = peaks[name] / peaks["stock"]
        lines.append(Line(f"{case}, peak: {name} / stock", ratio, at_most=at_most))
    return lines


def case(text: str) -> tuple[int, int, int]:
    """`FRAMES:HEADS:REPETITIONS`."""
    try:
        length, heads, repetitions = map(int, text.split(":"))
        if length <= RECENT + CHUNK or not 0 < heads <= HEADS or repetitions < 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be FRAMES:HEADS:REPETITIONS, more than {RECENT + CHUNK} frames and 1 to {HEADS} "
            f"heads, got {text!r}"
        ) from None
    return length, heads, repetitions


def main() -> None:
    quiet_process()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "cases", type=case, nargs="*", default=[(3000, 32, 15), (12000, 4, 3)],
        metavar="FRAMES:HEADS:REPETITIONS", help="default: 3000:32:15 12000:4:3",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/training.json"))
    options = parser.parse_args()
    record = environment(options.seed, "float32")
    torch.manual_seed(options.seed)
    results = [measure(*each) for each in options.cases]
    lines = [line for result in results for line in lines_of(result)]
    publish("training", options.out, record, {"arms": SETTINGS}, lines, results=results)


if __name__ == "__main__":
    main()
