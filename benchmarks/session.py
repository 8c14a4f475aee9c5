"""A long conversation, one step at a time, and what it leaves behind: for soak and ttt_layers."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from held import resident_mb
from moshi.modules.streaming import StreamingModule
from rich.progress import Progress
from torch import Tensor
from weights import Watch, last_layer_bound, memories_of

from ttt_cache.evaluation.lines import Line
from ttt_cache.patch import Patch
from ttt_cache.patched import PatchedState
from ttt_cache.targets import attention_of

BLOCK = 1000  # steps between two looks at the memory of the process
YOUNG = 256  # steps of a fresh state: past its first evictions
States = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """A patched model and how it is fed.

    Attributes:
        model: what streams.
        frames: room for a block of inputs, one step's on each row.
        draw: fills that room with random inputs.
        step: one step's inputs -> output, one number or more.
        prepare: called when a streaming state is new.
    """

    model: StreamingModule
    handle: Patch
    frames: Tensor
    draw: Callable[[Tensor, torch.Generator], Any]
    step: Callable[[Tensor], Tensor]
    prepare: Callable[[], None] = lambda: None

    def inputs(self, steps: int, seed: int) -> Iterator[Tensor]:
        """Blocks of seeded random inputs, always in the same memory."""
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, steps, BLOCK):
            self.draw(self.frames, generator)
            yield self.frames[: steps - start]

    def states(self) -> list[PatchedState]:
        """The streaming states of the patched layers."""
        layers = [attention_of(self.handle.transformer, layer) for layer in self.handle.layers]
        states = [attention._streaming_state for attention in layers]
        return [state for state in states if isinstance(state, PatchedState)]

    def tensors(self) -> list[Tensor]:
        """Every tensor of those states but the exec masks."""
        return [tensor for state in self.states() for _, tensor in state.cache.tensors()]


def soak(talk: Conversation, steps: int, seed: int) -> States:
    """Stream `steps` random inputs; the model must be streaming."""
    states = [state.cache for state in talk.states()]
    watch, log = Watch(talk.handle, states), {"not_finite": 0, "rss": [], "held": [], "ms": []}
    with Progress(auto_refresh=False) as progress:
        task = progress.add_task("stream", total=steps)
        for frames in talk.inputs(steps, seed):
            began, spoilt = time.perf_counter_ns(), torch.zeros((), dtype=torch.long)
            for frame in frames:
                spoilt += (~talk.step(frame).isfinite()).sum()
                watch.look()
            log["ms"].append((time.perf_counter_ns() - began) / len(frames) / 1e6)
            log["not_finite"] += int(spoilt)
            log["rss"].append(resident_mb())
            # glibc keeps up to 2 MB of what was freed, now more, now less: have it given back.
            ctypes.CDLL(None).malloc_trim(0)
            log["held"].append(resident_mb())
            progress.update(task, advance=len(frames), refresh=True)
    log["weights"] = dict(zip(Watch.NAMES, watch.peak.tolist(), strict=True))
    log["weights_at_end"] = dict(zip(Watch.NAMES, watch.now.tolist(), strict=True))
    log["state_not_finite"] = sum(int((~t.isfinite()).sum()) for t in talk.tensors())
    return log


def age(talk: Conversation, old: States, steps: int, pairs: int, seed: int) -> States:
    """The step time of the state `old` of `steps` steps beside fresh ones."""
    # The same phase in the chunk as the old state, so that both publish in the same steps.
    young = YOUNG + steps % talk.handle.config.chunk
    fresh, other = (fresh_state(talk, young, seed) for _ in range(2))
    talk.model.set_streaming_state(fresh)
    races = {
        "null": race(talk, fresh, other, pairs, seed + 1),
        "aged": race(talk, old, fresh, pairs, seed + 2),
    }
    talk.model._stop_streaming()
    return races


def fresh_state(talk: Conversation, steps: int, seed: int) -> States:
    """A state of its own after a few steps."""
    with talk.model.streaming(1):
        talk.prepare()
        for frame in (frame for frames in talk.inputs(steps, seed) for frame in frames):
            talk.step(frame)
        return talk.model.get_streaming_state()


def race(talk: Conversation, one: States, two: States, pairs: int, seed: int) -> States:
    """Step two states on the same inputs in turn; medians in ms and the ratio one / two.

    The model is the same, so are its weights in the CPU's caches; only the state is exchanged, by
    reference and outside the timed call. Who goes first alternates, and is turned round in every
    chunk, so that neither state always meets a chunk's end first.
    """
    times: tuple[list[int], list[int]] = ([], [])
    frames = (frame for block in talk.inputs(pairs, seed) for frame in block)
    for done, frame in enumerate(frames):
        first = (done + done // 8) % 2
        for arm in (first, 1 - first):
            talk.model.set_streaming_state((one, two)[arm])
            began = time.perf_counter_ns()
            talk.step(frame)
            times[arm].append(time.perf_counter_ns() - began)
    quartiles = [[q / 1e6 for q in statistics.quantiles(arm)] for arm in times]
    medians = [middle for _, middle, _ in quartiles]
    return {"medians_ms": medians, "quartiles_ms": quartiles, "ratio": medians[0] / medians[1]}


def lines_of(log: States, steps: int, warm: int, handle: Patch) -> list[Line]:
    """Figures of `soak` and `age` with their targets; `warm`: looks that are warm-up."""
    rss, held = log["rss"][warm:], log["held"][warm:]
    peak, last, aged = log["weights"], log["weights_at_end"], log["aged"]
    bound = last_layer_bound(handle)
    hidden = [
        # The bound is 1; the columns are scaled in float32.
        Line("column of a layer before F / its start, largest", peak["column"], "", 1 + 1e-6),
        Line("|G| of a head, largest seen", peak["grad"]),
    ]
    return [
        Line("steps", steps),
        Line("outputs not finite", log["not_finite"], "", 0),
        Line("state elements not finite at the end", log["state_not_finite"], "", 0),
        Line("RSS after warm-up", rss[0], "MB"),
        Line("RSS at the end", rss[-1], "MB"),
        Line("RSS growth after warm-up, largest", max(rss) - rss[0], "MB", 1.0),
        Line("the same, freed memory given back", max(held) - held[0], "MB", 1.0),
        Line("|F| of a head, largest seen", peak["last"], "", bound),
        Line("|F| of a head at the end", last["last"], "", bound),
        *(hidden if memories_of(handle)[0].fast.hidden else []),
        Line("step, old state", aged["medians_ms"][0], "ms"),
        Line("step, fresh state", aged["medians_ms"][1], "ms"),
        Line("step, old / fresh", aged["ratio"], "", 1.02),
        Line("step, fresh / fresh (null test)", log["null"]["ratio"]),
    ]
