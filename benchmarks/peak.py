"""What torch has allocated on the CPU at the worst moment of something, by its own profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that `run` has allocated at a time, beside what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    every: list[Any] = record.profiler.kineto_results.events()
    events = sorted((e for e in every if e.name() == "[memory]"), key=lambda e: e.start_ns())
    held = torch.tensor([event.nbytes() for event in events])
    return int(held.cumsum(0).max())
