"""Eight hours of conversation through a small patched Moshi transformer, one step at a time.

Shows that nothing grows with the length of a session: not the memory of the process, not the fast
weights, not the time of a step. The step time is measured at the end, on the state that has seen
everything and on one that has just begun, alternately, on the same model and inputs.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import Line, environment, publish, quiet_process, transformer
from moshi.modules.transformer import StreamingTransformer
from rich.progress import Progress
from torch import Tensor

import ttt_cache
from ttt_cache.memory.ttt_mlp import TTTMLP
from ttt_cache.patch import Patch, PatchedState
from ttt_cache.state import CacheState
from ttt_cache.targets import attention_of

DIM, LAYERS, HEADS = 64, 2, 4
BLOCK = 1000  # steps between two looks at memory and weights
WARM_UP = 0.05  # share of the steps after which memory must not grow
YOUNG = 256  # steps of a fresh state: past its first evictions
States = dict[str, Any]


def build(seed: int) -> tuple[StreamingTransformer, Patch]:
    """The model, patched in all layers with default settings."""
    torch.manual_seed(seed)
    model = transformer(DIM, HEADS, LAYERS, 4 * DIM)
    handle = ttt_cache.patch(model)
    for memory in memories_of(handle):
        # A new memory adds nothing to the output; here it must be seen to stay finite.
        torch.nn.init.normal_(memory.to_value, std=memory.latent_dim**-0.5)
    return model, handle


def inputs(steps: int, seed: int) -> Iterator[Tensor]:
    """Blocks of seeded random frames `[steps, 1, 1, DIM]`, always in the same memory."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.empty(BLOCK, 1, 1, DIM)
    for start in range(0, steps, BLOCK):
        yield frames.normal_(generator=generator)[: steps - start]


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def memories_of(handle: Patch) -> list[TTTMLP]:
    memories = [cache.memory for cache in handle.caches.values()]
    return [memory for memory in memories if isinstance(memory, TTTMLP)]


def caches_of(model: StreamingTransformer) -> list[CacheState]:
    states = [attention_of(model, layer)._streaming_state for layer in range(LAYERS)]
    return [state.cache for state in states if isinstance(state, PatchedState)]


def fast_weights(model: StreamingTransformer, handle: Patch) -> dict[str, float]:
    """The largest fast weights of any head: |W2|, a column of W1 beside its start, |G|."""
    found = {"w2": 0.0, "w1_column": 0.0, "grad": 0.0}
    for slow, state in zip(memories_of(handle), caches_of(model), strict=True):
        figures = {name: state.memory[name].norm(dim=(-1, -2)) for name in ("w2", "grad")}
        start = slow.fast.w1.double().norm(dim=-2)
        figures["w1_column"] = state.memory["w1"].double().norm(dim=-2) / start
        found = {name: max(found[name], float(figures[name].max())) for name in found}
    return found


def w2_bound(handle: Patch) -> float:
    """The bound of docs/semantics.md: max(sqrt(n d), |W2 at version 0|) + C sqrt(d)."""
    n, d, chunk = handle.config.hidden_dim, handle.config.memory_dim, handle.config.chunk
    first = max(float(m.fast.w2.norm(dim=(-1, -2)).max()) for m in memories_of(handle))
    return max((n * d) ** 0.5, first) + chunk * d**0.5


def soak(model: StreamingTransformer, handle: Patch, steps: int, seed: int) -> dict[str, Any]:
    """Stream `steps` random frames; the model must be streaming."""
    outputs = torch.empty(BLOCK, DIM)
    log: dict[str, Any] = {"not_finite": 0, "rss": [], "held": [], "ms": [], "weights": []}
    with Progress(auto_refresh=False) as progress:
        task = progress.add_task("soak", total=steps)
        for frames in inputs(steps, seed):
            began = time.perf_counter_ns()
            for frame, output in zip(frames, outputs, strict=False):
                output.copy_(model(frame)[0, 0])
            log["ms"].append((time.perf_counter_ns() - began) / len(frames) / 1e6)
            log["not_finite"] += int((~outputs[: len(frames)].isfinite()).sum())
            log["rss"].append(resident_mb())
            # glibc keeps up to 2 MB of what was freed, now more, now less: have it given back.
            ctypes.CDLL(None).malloc_trim(0)
            log["held"].append(resident_mb())
            log["weights"].append(fast_weights(model, handle))
            progress.update(task, advance=len(frames), refresh=True)
    return log


def fresh_state(model: StreamingTransformer, steps: int, seed: int) -> States:
    """A state of its own after a few steps."""
    with model.streaming(1):
        for frame in (frame for frames in inputs(steps, seed) for frame in frames):
            model(frame)
        return model.get_streaming_state()


def race(model: StreamingTransformer, one: States, two: States, pairs: int, seed: int) -> States:
    """Step two states on the same inputs in turn; medians in ms and the ratio one / two.

    The model is the same, so are its weights in the CPU's caches; only the state is exchanged, by
    reference and outside the timed call. Who goes first alternates, and is turned round in every
    chunk, so that neither state always meets a chunk's end first.
    """
    times: tuple[list[int], list[int]] = ([], [])
    frames = (frame for block in inputs(pairs, seed) for frame in block)
    for done, frame in enumerate(frames):
        first = (done + done // 8) % 2
        for arm in (first, 1 - first):
            model.set_streaming_state((one, two)[arm])
            began = time.perf_counter_ns()
            model(frame)
            times[arm].append(time.perf_counter_ns() - began)
    quartiles = [[q / 1e6 for q in statistics.quantiles(arm)] for arm in times]
    medians = [middle for _, middle, _ in quartiles]
    return {"medians_ms": medians, "quartiles_ms": quartiles, "ratio": medians[0] / medians[1]}


@torch.no_grad()
def run(steps: int, seed: int, pairs: int) -> tuple[list[Line], States, States]:
    """Lines of the table, details for the JSON, settings."""
    model, handle = build(seed)
    with model.streaming(1):
        log = soak(model, handle, steps, seed + 1)
        states = [tensor for cache in caches_of(model) for _, tensor in cache.tensors()]
        old = model.get_streaming_state()
    log["state_not_finite"] = sum(int((~tensor.isfinite()).sum()) for tensor in states)
    # The same phase in the chunk as the old state, so that both publish in the same steps.
    young = YOUNG + steps % handle.config.chunk
    fresh, other = (fresh_state(model, young, seed + 2) for _ in range(2))
    model.set_streaming_state(fresh)
    log["null"] = race(model, fresh, other, pairs, seed + 3)
    log["aged"] = race(model, old, fresh, pairs, seed + 4)
    settings = {"pairs": pairs, "young": young, **asdict(handle.config)}
    return lines_of(log, steps, w2_bound(handle)), log, settings


def lines_of(log: States, steps: int, bound: float) -> list[Line]:
    warm = int(len(log["rss"]) * WARM_UP)
    rss, held = log["rss"][warm:], log["held"][warm:]
    last, aged = log["weights"][-1], log["aged"]
    weights = {name: max(look[name] for look in log["weights"]) for name in last}
    return [
        Line("steps", steps),
        Line("outputs not finite", log["not_finite"], "", 0),
        Line("state elements not finite at the end", log["state_not_finite"], "", 0),
        Line("RSS after warm-up", rss[0], "MB"),
        Line("RSS at the end", rss[-1], "MB"),
        Line("RSS growth after warm-up, largest", max(rss) - rss[0], "MB", 1.0),
        Line("the same, freed memory given back", max(held) - held[0], "MB", 1.0),
        Line("|W2| of a head, largest seen", weights["w2"], "", bound),
        Line("|W2| of a head at the end", last["w2"], "", bound),
        # The bound is 1; the columns are scaled in float32.
        Line("column of W1 / its start, largest", weights["w1_column"], "", 1 + 1e-6),
        Line("|G| of a head, largest seen", weights["grad"]),
        Line("step, old state", aged["medians_ms"][0], "ms"),
        Line("step, fresh state", aged["medians_ms"][1], "ms"),
        Line("step, old / fresh", aged["ratio"], "", 1.02),
        Line("step, fresh / fresh (null test)", log["null"]["ratio"]),
    ]


def main() -> None:
    quiet_process()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=360_000, help="8 hours at 12.5 a second")
    parser.add_argument("--pairs", type=int, default=4_000, help="timed steps of each state")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/soak.json"))
    options = parser.parse_args()
    record = environment(options.seed, "float32")
    lines, log, settings = run(options.steps, options.seed, options.pairs)
    publish("soak", options.out, record, settings, lines, log=log)


if __name__ == "__main__":
    main()
