"""How a step is timed, and how arms take turns.

A sample is the mean over a whole chunk of consecutive steps, so that each holds one step that
publishes a memory version; arms take turns in one process, in another order each time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

Frames = tuple[Tensor, Tensor]  # hidden and projected, one step after the other


class Timer(Protocol):
    """What can be timed: milliseconds of a step, as the mean over the frames given."""

    def chunk(self, frames: Frames, /) -> float: ...


class Eager:
    """Calls as they are.

    Where all is computed in one thread, by its processor time: on a machine that others use too, a
    long sample is interrupted more surely than a short one. Otherwise by the wall clock.
    """

    def __init__(self, step: Callable[[Tensor, Tensor], object]) -> None:
        self.step = step
        self.clock = time.thread_time_ns if torch.get_num_threads() == 1 else time.perf_counter_ns

    def chunk(self, frames: Frames) -> float:
        steps = list(zip(*(each.unbind() for each in frames), strict=True))
        began = self.clock()
        for inputs in steps:
            self.step(*inputs)
        return (self.clock() - began) / len(steps) / 1e6


class Cold:
    """Writes more than the L2 cache of a GPU holds, so that nothing of a sample is found there."""

    def __init__(self, device: torch.device) -> None:
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self.buffer = torch.empty(4 * size, dtype=torch.int8, device=device)

    def __call__(self) -> None:
        self.buffer.zero_()


class Captured:
    """A step as a CUDA graph, by the GPU's own clock and with a cold L2 cache.

    Args:
        example: inputs of one step; the graph keeps copies that later inputs are copied to.
    """

    WARM_UP = 3  # what is compiled, is compiled before the capture

    def __init__(
        self, step: Callable[[Tensor, Tensor], object], example: Frames, cold: Cold
    ) -> None:
        self.inputs = (example[0].clone(), example[1].clone())
        self.cold, self.graph = cold, torch.cuda.CUDAGraph()
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(self.WARM_UP):
                step(*self.inputs)
        torch.cuda.current_stream().wait_stream(beside)
        with torch.cuda.graph(self.graph):
            step(*self.inputs)

    def chunk(self, frames: Frames) -> float:
        spans = []
        for inputs in zip(*(each.unbind() for each in frames), strict=True):
            for mine, given in zip(self.inputs, inputs, strict=True):
                mine.copy_(given)
            spans.append(gpu_span(self.graph.replay, self.cold))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in spans) / len(spans)


def gpu_span(
    call: Callable[[], object], cold: Callable[[], None]
) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Events before and after a call; what makes the cache cold also keeps the queue from running
    empty, so that the time of the launch is not in between."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cold()
    start.record()
    call()
    end.record()
    return start, end


def interleave(
    timers: Mapping[str, Timer],
    draw: Callable[[], Frames],
    repetitions: int,
    done: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Milliseconds of a step, for every sample of every arm.

    Args:
        draw: the frames of one sample; all arms get the same.
        done: called after each turn, of which there are `repetitions + 1`.
    """
    names = list(timers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, repetitions):
        frames, first = draw(), turn % len(names)
        for name in names[first:] + names[:first]:
            spent = timers[name].chunk(frames)
            if turn >= 0:  # the turn before is for caches and allocators
                samples[name].append(spent)
        done()
    return samples
