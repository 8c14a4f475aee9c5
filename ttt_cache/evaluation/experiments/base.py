"""What every experiment is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from matplotlib.figure import Figure
from rich.table import Table

from ttt_cache.config import CacheConfig

from ..arms import Arm
from ..findings import Finding
from ..lines import Line
from ..measures import Early, Listen, Span
from ..protocol import Point
from ..subject import Subject
from ..tables import (
    cost_table,
    jump_table,
    mass_table,
    nats_table,
    parts_table,
    recall_by_table,
    recall_table,
    slope_table,
)

BINS = {"age": "frames ago", "load": "facts known", "rewritten": "times overwritten"}
TIMES = (1, 4, 8, 32, 96)  # lengths that are looked at, in contexts of the model
EARLY = 8  # times as many conversations tell how they begin


@dataclass(frozen=True)
class Plan:
    """How much of what is measured.

    Attributes:
        rows: conversations.
        frames: length of each.
    """

    subject: Subject
    rows: int
    frames: int

    @property
    def spans(self) -> tuple[Span, ...]:
        """The first context, and the one that ends at some multiples of it."""
        context = self.subject.context
        spans = [
            Span("1x" if n == 1 else f"at {n}x", (n - 1) * context, n * context)
            for n in TIMES
            if n * context <= self.frames
        ]
        return tuple(spans) or (Span("all", 0, self.frames),)

    @property
    def ends(self) -> tuple[Span, ...]:
        """The first of these spans and the last."""
        return tuple(dict.fromkeys((self.spans[0], self.spans[-1])))

    @property
    def window(self) -> int:
        """The most frames that a layer with a memory sees exactly, before a chunk leaves it."""
        return self.subject.far - 1

    def listen(self) -> Listen:
        chunk = CacheConfig.from_fields(self.subject.settings).chunk
        return Listen(self.rows, self.frames, self.subject.far - chunk, chunk, self.spans)

    def early(self) -> Early:
        """A context each of more conversations."""
        frames = min(self.frames, self.subject.context)
        return Early(**vars(replace(self, rows=EARLY * self.rows, frames=frames).listen()))

    def arms(self) -> dict[str, Arm]:
        return self.subject.arms(self.frames)


class Experiment:
    """Points to measure, and what is made of their results.

    Attributes:
        name: of the command.
        about: one sentence for `--help`.
        question: what the picture answers, its title.
        rows: conversations, unless others are wanted.
        times: length of a conversation, in contexts of the model, likewise.
        size: of the picture, inches.
        beside: the arm that cross-entropy is compared with.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    question: ClassVar[str]
    rows: ClassVar[int] = 8
    times: ClassVar[int] = 8
    size: ClassVar[tuple[float, float]] = (17.0, 6.0)
    beside: ClassVar[str] = "full"

    def frames(self, subject: Subject) -> int:
        """Length of a conversation, unless another is wanted."""
        return self.times * subject.context

    def points(self, plan: Plan) -> list[Point]:
        """What is measured.

        Raises:
            ValueError: this cannot be done with this subject, with the reason.
        """
        raise NotImplementedError

    def glance(self, plan: Plan, findings: dict[str, Finding]) -> list[Table]:
        """What can be said of some of the points alone."""
        tables = [nats_table(findings, plan.spans, self.beside)]
        if any(finding.recalls for finding in findings.values()):
            tables.insert(0, recall_table(findings, plan.spans))
        return tables

    def tables(self, plan: Plan, findings: dict[str, Finding]) -> list[Table]:
        tables = []
        if any(finding.recalls for finding in findings.values()):
            tables.append(recall_table(findings, plan.spans))
            for by, what in BINS.items():
                tables += [recall_by_table(findings, span, by, what) for span in plan.ends]
        tables.append(nats_table(findings, plan.spans, self.beside))
        tables += [parts_table(findings, span) for span in plan.ends]
        tables.append(jump_table(findings, plan.window, self.beside))
        tables.append(slope_table(findings, plan.window))
        for measure, table in (("mass", mass_table), ("cost", cost_table)):
            having = {name: f for name, f in findings.items() if measure in f.results}
            tables += [table(having)] if having else []
        return tables

    def lines(self, plan: Plan, findings: dict[str, Finding]) -> Sequence[Line]:
        """Targets of the issue that this experiment answers; on the testbed only."""
        return ()

    def draw(self, plan: Plan, findings: dict[str, Finding], figure: Figure) -> None:
        raise NotImplementedError
