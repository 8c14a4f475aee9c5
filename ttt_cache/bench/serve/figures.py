"""What a level showed: how late answers were, what was lost, whether it was in real time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ttt_cache.serving.conversation import FRAME_S

from .client import Heard
from .server import Seen, step_quantile

FRAME_MS = FRAME_S * 1000
BEHIND_MS = 20.0  # that the generator itself may be late at p99, before its figures are void


@dataclass(frozen=True)
class Level:
    """So many conversations at once, measured. Times are milliseconds; `None`: not measured.

    Attributes:
        refused: clients that were not taken in, at least; then nothing is measured.
        broken: conversations that the server ended.
        frames: that were due an answer.
        lost: of these, that had none by the end.
        late_share: of these, answered more than 80 ms after they were due, or not at all.
        p50_ms, p95_ms, p99_ms, max_ms: from due to answered; infinite where that was lost.
        behind_p99_ms: that the generator itself was late to send.
        step_p50_ms, step_p99_ms: of the server's steps, from its histogram.
        server_late_share: of the frames that it counts itself.
        reasons: why clients were refused and conversations ended, and how often.
    """

    clients: int
    refused: int = 0
    broken: int = 0
    frames: int = 0
    lost: int = 0
    late_share: float | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    max_ms: float | None = None
    behind_p99_ms: float | None = None
    step_p50_ms: float | None = None
    step_p99_ms: float | None = None
    server_late_share: float | None = None
    reasons: tuple[str, ...] = ()

    @property
    def on_schedule(self) -> bool:
        """Whether the generator sent when it should have."""
        return self.behind_p99_ms is None or self.behind_p99_ms <= BEHIND_MS

    @property
    def held(self) -> bool | None:
        """Whether all were held in real time: none refused, broken or lost, p99 within a frame.

        `None`: unknown, as the generator was late itself.
        """
        if not self.on_schedule:
            return None
        whole = not (self.refused or self.broken or self.lost)
        return whole and self.p99_ms is not None and self.p99_ms <= FRAME_MS

    def as_json(self) -> dict[str, Any]:
        """What is infinite, as JSON has no word for it, is `None`."""
        own = {name: None if _infinite(value) else value for name, value in asdict(self).items()}
        return own | {"on_schedule": self.on_schedule, "held": self.held}


def refused(clients: int, reasons: Sequence[str]) -> Level:
    """A level that did not begin."""
    return Level(clients, refused=len(reasons), reasons=_counted(reasons))


def figures(
    clients: int, heard: Sequence[Heard], before: Seen | None = None, after: Seen | None = None
) -> Level:
    """A level from what its conversations showed, and two looks at the server."""
    waited = np.sort(np.concatenate([each.waited for each in heard])) * 1000
    behind = np.sort(np.concatenate([each.behind for each in heard])) * 1000
    ended = [each.ended for each in heard if each.ended is not None]
    return Level(
        clients,
        broken=len(ended),
        frames=len(waited),
        lost=int(np.isinf(waited).sum()),
        late_share=float((waited > FRAME_MS).mean()) if len(waited) else None,
        p50_ms=percentile(waited, 50),
        p95_ms=percentile(waited, 95),
        p99_ms=percentile(waited, 99),
        max_ms=percentile(waited, 100),
        behind_p99_ms=percentile(behind, 99),
        reasons=_counted(ended),
        **_of_server(before, after),
    )


def percentile(ordered: np.ndarray, percent: int) -> float | None:
    """The smallest value that so many percent do not exceed; exact, where some are infinite."""
    if not len(ordered):
        return None
    return float(ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)])


def _of_server(before: Seen | None, after: Seen | None) -> dict[str, Any]:
    if before is None or after is None:
        return {}
    steps = {f"step_p{q}_ms": step_quantile(before, after, q / 100) for q in (50, 99)}
    frames = after.frames - before.frames
    late = (after.late - before.late) / frames if frames else None
    found = {name: s if s is None else s * 1000 for name, s in steps.items()}
    return found | {"server_late_share": late}


def _counted(reasons: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{count} x {reason}" for reason, count in Counter(reasons).most_common())


def _infinite(value: Any) -> bool:
    return isinstance(value, float) and math.isinf(value)
