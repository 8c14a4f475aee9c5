"""All arms at one batch size: built, checked, filled, timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .arms import Arm
from .check import check
from .core import Core, Place
from .plan import Plan
from .timing import Captured, Cold, Eager, Timer, interleave


@dataclass(frozen=True)
class Row:
    """One arm at one batch size.

    Attributes:
        context: frames that a stock arm remembers; `None` where nothing is forgotten at once.
        state_bytes: of this layer and one conversation.
        samples_ms: each the mean of a step over a chunk.
        off: largest difference to what it must equal, as a share of the scale; stock has none.
    """

    arm: str
    about: str
    batch: int
    context: int | None
    state_bytes: int
    samples_ms: list[float]
    off: float | None

    @property
    def step_ms(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def frames_per_second(self) -> float:
        """Frames that the core answers, of all conversations together."""
        return self.batch / self.step_ms * 1e3

    def as_json(self) -> dict[str, Any]:
        derived = {"step_ms": self.step_ms, "frames_per_second": self.frames_per_second}
        return asdict(self) | derived


Absent = dict[str, str]


def turns(plan: Plan) -> int:
    """How often `measure` says that something is done."""
    return plan.check_steps + plan.repetitions + 1


def measure(
    plan: Plan, arms: list[Arm], batch: int, done: Callable[[], object]
) -> tuple[list[Row], Absent]:
    """Rows of the arms, and of those that cannot be had at this batch size, why not.

    Raises:
        WrongAnswerError: an arm does not compute what it should.
    """
    place = Place(batch, plan.device, plan.dtype, plan.seed, plan.widths)
    built, absent = build(arms, place)
    apart = check(built, place, plan.recent, plan.chunk, plan.check_steps, done)
    timers: dict[str, Timer] = {}
    cold = Cold(plan.device) if plan.device.type == "cuda" else None
    for name, (arm, core) in built.items():
        if arm.stock:
            core.fill()
        timers[name] = timer(core, cold)
    samples = interleave(timers, lambda: place.frames(plan.chunk), plan.repetitions, done)
    rows = [
        Row(
            name, arm.about, batch, arm.context if arm.stock else None,
            core.state_bytes, samples[name], apart.get(name),
        )
        for name, (arm, core) in built.items()
    ]  # fmt: skip
    return rows, absent


def build(arms: list[Arm], place: Place) -> tuple[dict[str, tuple[Arm, Core]], Absent]:
    """Cores of the arms, and why others cannot be built: no room, or their library refuses."""
    built, absent = dict[str, tuple[Arm, Core]](), Absent()
    for arm in arms:
        try:
            built[arm.name] = arm, arm.build(place)
        except torch.cuda.OutOfMemoryError:
            absent[arm.name] = f"its state for {place.batch} conversations does not fit"
        except Exception as error:
            if arm.peer is None:
                raise  # our own must run
            absent[arm.name] = f"it could not be set up: {error}"
    return built, absent


def timer(core: Core, cold: Cold | None) -> Timer:
    """On a GPU a captured graph and cold caches; on the CPU plain calls."""
    if cold is None:
        return Eager(core.step)
    hidden, projected = core.place.frames(1)
    return Captured(core.step, (hidden[0], projected[0]), cold)
