"""The figures of a conversation: one place from which table, picture and JSON are made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .conversation import Arm, Record

FRAME_SECONDS = 0.08
WARM_UP = 20  # frames whose times are left out, on runs that are long enough
SPAN = 500  # frames at each end over which step times are summed up


@dataclass(frozen=True)
class ArmFigures:
    """Bytes of one conversation's state, and milliseconds per step at both ends of the run."""

    state_bytes_start: int
    state_bytes_end: int
    state_bytes_max: int
    first_median_ms: float
    first_p99_ms: float
    last_median_ms: float
    last_p99_ms: float

    @property
    def real_time_factor(self) -> float:
        """Seconds of compute per second of conversation; below 1 keeps up."""
        return self.last_median_ms / 1000 / FRAME_SECONDS


def spans(frames: int) -> tuple[slice, slice]:
    """The frames at the start and at the end whose times are summed up: 500, at most a fifth."""
    warm_up = min(WARM_UP, frames // 5)
    length = max(1, min(SPAN, frames // 5))
    return slice(warm_up, warm_up + length), slice(frames - length, frames)


def figures(arm: Arm) -> ArmFigures:
    """Sum up one model's conversation."""
    times = [
        float(value) * 1000
        for span in spans(len(arm.seconds))
        for value in np.percentile(arm.seconds[span], [50, 99])
    ]
    sizes = arm.state_bytes
    return ArmFigures(sizes[0], sizes[-1], max(sizes), *times)


def as_json(record: Record) -> dict[str, Any]:
    """The figures of both models and the samples behind them, as plain JSON values."""
    arms = {"stock": record.stock, "patched": record.patched}
    first, last = spans(record.frames)
    return {
        "frames": record.frames,
        "minutes": record.frames * FRAME_SECONDS / 60,
        "first_frames": [first.start, first.stop],
        "last_frames": [last.start, last.stop],
        "frames_with_the_same_text": record.agreed,
        **{
            name: asdict(figures(arm)) | {"real_time_factor": figures(arm).real_time_factor}
            for name, arm in arms.items()
        },
        "samples": {
            "frame": record.sampled,
            **{f"{name}_state_bytes": arm.state_bytes for name, arm in arms.items()},
            "process_bytes": record.process_bytes,
        },
    }
