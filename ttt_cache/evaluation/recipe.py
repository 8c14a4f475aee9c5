"""How an adapter is trained for an evaluation: the numbers, in one place.

Sequences are given in frames of the testbed; `stretched` makes them fit another context.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ttt_cache.checks import real_number
from ttt_cache.testbed.model import CONTEXT


@dataclass(frozen=True)
class Course:
    """Steps of AdamW over one cycle of the learning rate.

    Args:
        stages: frames of a sequence, sequences in a step and steps, one stage after the other.
        lr: the highest learning rate.
        pct_start: share of the steps in which it rises.
        max_norm: gradients are clipped to this norm.
    """

    stages: tuple[tuple[int, int, int], ...]
    lr: float
    weight_decay: float = 0.0
    pct_start: float = 0.05
    max_norm: float = 1.0

    @property
    def steps(self) -> int:
        return sum(steps for _, _, steps in self.stages)

    def scaled(self, share: float) -> Course:
        """The same with a share of the steps of every stage."""
        stages = ((frames, rows, round(steps * share)) for frames, rows, steps in self.stages)
        return replace(self, stages=tuple(stage for stage in stages if stage[2]))

    def stretched(self, factor: float) -> Course:
        """The same on longer sequences."""
        stages = ((round(frames * factor), rows, steps) for frames, rows, steps in self.stages)
        return replace(self, stages=tuple(stages))

    def beyond(self, least: int) -> Course:
        """The same on sequences of at least so many frames."""
        stages = ((max(frames, least), rows, steps) for frames, rows, steps in self.stages)
        return replace(self, stages=tuple(stages))


@dataclass(frozen=True)
class Recipe:
    """Layer-wise distillation, then training end to end, at last on what goes on and on.

    Args:
        distill: each layer learns to answer as full context would (`ttt_cache.distill`).
        tune: the memory learns by the model's own predictions.
        last: the same on conversations that go on from step to step, their state carried along, so
            that the memory learns to last; half of them begin anew in every step.
        longest: steps of the longest such conversation.
        slower: by what the inner learning rate of the layers before the last is divided first, so
            that they walk no further in a long conversation than they are followed.
        moshi: share of Moshi's loss in what is tuned on; the rest is the divergence from what
            stock Moshi, with its whole context, predicts.
        text_padding: weight of text padding, as moshi-finetune's `text_padding_weight`.
        audio: weight of audio beside text.
    """

    distill: Course
    tune: Course
    last: Course = field(default_factory=lambda: Course((), lr=1.5e-3))
    longest: int = 512
    slower: float = 1e5
    moshi: float = 0.0
    text_padding: float = 0.05
    audio: float = 0.25

    def __post_init__(self) -> None:
        for name in ("moshi", "text_padding"):
            real_number(name, getattr(self, name), 0, 1)
        real_number("audio", self.audio, 0)
        real_number("slower", self.slower, 1)

    @property
    def steps(self) -> int:
        return sum(course.steps for course in self._courses.values())

    @property
    def lessons(self) -> tuple[tuple[int, int, int], ...]:
        """All stages that take sequences from their first frame to their last."""
        return self.distill.stages + self.tune.stages

    def made(self) -> dict[str, Any]:
        """What tells its adapters from another recipe's: nothing of a stage that has no steps."""
        unused = () if self.last.steps else ("last", "longest", "slower")
        return {name: value for name, value in asdict(self).items() if name not in unused}

    @property
    def _courses(self) -> dict[str, Course]:
        return {"distill": self.distill, "tune": self.tune, "last": self.last}

    def scaled(self, share: float) -> Recipe:
        """The same with a share of the steps."""
        return replace(self, **{n: course.scaled(share) for n, course in self._courses.items()})

    def stretched(self, context: int) -> Recipe:
        """The same for a model of another context than the testbed's: longer sequences."""
        factor = context / CONTEXT
        return replace(self, **{n: c.stretched(factor) for n, c in self._courses.items()})

    def beyond(self, least: int) -> Recipe:
        """The same on sequences of at least so many frames: a wide window needs long ones."""
        return replace(self, **{n: course.beyond(least) for n, course in self._courses.items()})


# Of the shipped adapters. Many steps of few sequences teach more than the reverse.
DEFAULT = Recipe(
    distill=Course(((320, 2, 1200),), lr=3e-3),
    tune=Course(((512, 2, 1400), (1024, 2, 200)), lr=2e-3),
    last=Course(((256, 6, 600),), lr=1.5e-3),
)

# Of the hybrid layer. It has the whole context, so full context has nothing to teach it: it learns
# by Moshi's own loss, from twice the context, of which half has left the ring.
HYBRID = Recipe(
    distill=Course((), lr=3e-3),
    tune=Course(((2 * CONTEXT, 1, 500),), lr=2e-3),
    moshi=1.0,
)

# Of every point of a sweep: alike, so that points compare, and short, since there are many.
SWEEP = Recipe(
    distill=Course(((320, 2, 400),), lr=3e-3),
    tune=Course(((512, 2, 200),), lr=2e-3),
)
