"""One setting at a time: the window, the virtual tokens, the gate, the layers.

Every point trains an adapter of its own, all by the same recipe.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar

from matplotlib.figure import Figure

from ttt_cache.config import GATES, CacheConfig

from .. import pictures
from ..arms import Arm, window
from ..findings import Finding
from ..measures import Cost, Listen
from ..protocol import Point
from ..recipe import SWEEP, Recipe
from .base import Experiment, Plan

PLANNED_CONTEXT = 3000  # frames, of the plan's windows
RECENT = (50, 100, 200, 500, 1000)  # frames, of a context of 3000
VIRTUAL = (1, 2, 5, 10, 20, 50, 100)
TOP = 7 / 32  # share of the layers that the plan patches first


class Sweep(Experiment):
    """Points along one setting, beside every control.

    Attributes:
        axis: of the setting.
        drawn: controls that are in the picture; every one is in the tables.
    """

    rows = 4
    axis: ClassVar[str]
    drawn: ClassVar[tuple[str, ...]] = ("full", "stock", "extended", "window")

    def along(self, plan: Plan) -> Iterable[Point]:
        """The points of the sweep itself."""
        raise NotImplementedError

    def listen(self, plan: Plan) -> Listen:
        """What is asked of all points: facts count as far where they are so in each of them."""
        return plan.listen()

    def points(self, plan: Plan) -> list[Point]:
        measures = self.listen(plan), Cost()
        beside = [Point(name, arm, measures) for name, arm in plan.arms().items()]
        return [*beside, *(replace(point, measures=measures) for point in self.along(plan))]

    def draw(self, plan: Plan, findings: dict[str, Finding], figure: Figure) -> None:
        spans = plan.ends
        shown = {
            name: finding
            for name, finding in findings.items()
            if finding.point.x is not None or name in self.drawn
        }
        recalls = any(finding.recalls for finding in shown.values())
        axes = figure.subplots(1, 2 if recalls else 1, squeeze=False)[0]
        pictures.sweep(axes[-1], shown, spans, lambda f, span: f.nats(span), "nats per frame")
        axes[-1].set_yscale("log")
        if recalls:
            label = "recall beyond the window"
            pictures.sweep(axes[0], shown, spans, lambda f, span: f.share(span), label)
            axes[0].set_ylim(-0.02, 1.02)
        for each in axes:
            self.scale(each, shown)
        axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))

    def scale(self, axes: Any, findings: dict[str, Finding]) -> None:
        """The axis of the setting."""
        placed = sorted({f.point.x for f in findings.values() if f.point.x is not None})
        axes.set_xscale("log")
        axes.set_xticks(placed, [f"{x:g}" for x in placed], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_xlabel(self.axis)


class Recent(Sweep):
    name = "recent"
    about = "The window from 50 to 1000 frames of 3000, with and without a memory beside it."
    question = "How much window does the memory replace?"
    axis = "recent (frames)"
    drawn = ("full", "stock", "extended")

    def windows(self, plan: Plan) -> list[int]:
        return [round(n * plan.subject.context / PLANNED_CONTEXT) for n in RECENT]

    def listen(self, plan: Plan) -> Listen:
        return replace(plan.listen(), recent=max(self.windows(plan)))

    def along(self, plan: Plan) -> Iterable[Point]:
        for recent in self.windows(plan):
            settings = {**plan.subject.settings, "recent": recent}
            yield trained(f"recent {recent}", settings, recent)
            yield Point(f"window {recent}", window(settings), (), recent)


class Virtual(Sweep):
    name = "virtual"
    about = "Virtual tokens from 1 to 100, beside as many clusters."
    question = "How many virtual tokens does it take?"
    axis = "virtual tokens"

    def along(self, plan: Plan) -> Iterable[Point]:
        given = plan.subject.settings
        kept = {name: given[name] for name in ("layers", "recent", "chunk") if name in given}
        for virtual in VIRTUAL:
            yield trained(f"virtual {virtual}", {**given, "virtual": virtual}, virtual)
            clusters = {**kept, "memory": "cluster", "virtual": virtual}
            arm = Arm("cluster", "clusters without training", clusters)
            yield Point(f"clusters {virtual}", arm, (), virtual)


class Listed(Sweep):
    """A sweep over what has no order."""

    def draw(self, plan: Plan, findings: dict[str, Finding], figure: Figure) -> None:
        pictures.side_by_side(figure, findings, plan.spans)


class Gates(Listed):
    name = "gates"
    about = "How window and memory are mixed: all six gates."
    question = "Which gate lets the memory in?"

    def along(self, plan: Plan) -> Iterable[Point]:
        for gate in GATES:
            yield trained(f"gate {gate}", {**plan.subject.settings, "gate": gate})


class Layers(Listed):
    name = "layers"
    about = "Which layers are patched: the top 7 of 32, the top half, all."
    question = "How many layers can do with a memory?"

    def along(self, plan: Plan) -> Iterable[Point]:
        count = plan.subject.layers
        for patched in sorted({max(1, round(TOP * count)), max(1, count // 2), count}):
            settings = {
                **plan.subject.settings,
                "layers": tuple(range(count - patched, count)),
            }
            yield trained(f"top {patched} of {count} layers", settings)


def trained(
    name: str, settings: dict[str, Any], x: float | None = None, recipe: Recipe | None = None
) -> Point:
    """A memory of these settings, trained by the recipe, `SWEEP` by default."""
    CacheConfig.from_fields(settings)  # a point that cannot be is refused before the first trains
    arm = Arm("hierarchical", "the window and the trained memory", settings, trained=True)
    return Point(name, arm, (), x, recipe=recipe or SWEEP)
