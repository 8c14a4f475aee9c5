"""Trained on one kind of conversation, measured on another, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.figure import Figure
from rich.table import Table

from .. import pictures
from ..findings import Finding
from ..protocol import Point
from ..recipe import SWEEP
from ..source import Source
from .base import Experiment, Plan
from .sweeps import trained


class Generalisation(Experiment):
    name = "generalisation"
    about = "An adapter trained on one kind of conversation, measured on another, and back."
    question = "Does a memory work on what it was not trained on?"
    rows = 4

    def points(self, plan: Plan) -> list[Point]:
        arms, measures = plan.arms(), (plan.listen(),)
        points = []
        for heard in _kinds(plan):
            for name, arm in arms.items():
                points.append(_on(Point(name, arm, measures), name, heard))
            for taught in _kinds(plan):
                point = trained("", dict(plan.subject.settings))
                point = replace(point, measures=measures, recipe=SWEEP, taught=taught)
                points.append(_on(point, f"trained on {taught.name}", heard))
        return points

    def tables(self, plan: Plan, findings: dict[str, Finding]) -> list[Table]:
        tables = []
        for heard in _kinds(plan):
            some = {
                finding.point.series: finding
                for finding in findings.values()
                if finding.point.source is heard
            }
            for table in super().tables(plan, some):
                table.title = f"{heard.name}. {table.title}"
                tables.append(table)
        return tables

    def draw(self, plan: Plan, findings: dict[str, Finding], figure: Figure) -> None:
        pictures.side_by_side(figure, findings, plan.spans)


def require_other(other: object | None) -> None:
    """Raise `ValueError` if there is no second kind of conversations."""
    if other is None:
        raise ValueError("generalisation needs two kinds of conversations: give --other-data too")


def _kinds(plan: Plan) -> Sequence[Source]:
    other = plan.subject.other
    require_other(other)
    assert other is not None
    return plan.subject.source, other


def _on(point: Point, what: str, heard: Source) -> Point:
    return replace(point, name=f"{what}, on {heard.name}", series=what, source=heard)
