"""Paired likelihoods, long after the evidence was heard: the memory beside the full cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from ttt_cache.checks import whole_number

from .. import pictures
from ..findings import Finding, Row
from ..measures import Paired
from ..pairs import Pairs as Counted
from ..protocol import Point
from ..source import SEGMENT
from ..subject import Subject
from ..tables import interval, share
from .base import Experiment, Plan

LENGTHS = (8000, 16000, 32000)  # frames
Kinds = dict[str, list[dict[str, Any]]]  # of an arm: by kind, a result for each length


class Pairs(Experiment):
    name = "pairs"
    about = "Is what is right likelier than what is wrong? After 8, 16 and 32 thousand frames."
    question = "Is what was told long ago still the likelier continuation?"
    size = 19.0, 9.0

    def frames(self, subject: Subject) -> int:
        return LENGTHS[-1]

    def points(self, plan: Plan) -> list[Point]:
        # What is told apart is two conversations; of recordings a third one comes between.
        whole_number("--rows of pairs", plan.rows, 2 if plan.subject.is_testbed else 3)
        whole_number("--frames of pairs", plan.frames, SEGMENT)
        lengths = (*(n for n in LENGTHS if n < plan.frames), plan.frames)
        far = plan.subject.far
        fillers = far, far + plan.subject.context  # beyond the window, and stock Moshi's ring
        measure = Paired(plan.rows, lengths, fillers)
        arms = plan.subject.arms(plan.frames + fillers[-1] + SEGMENT)  # questions come behind
        return [Point(name, arm, (measure,)) for name, arm in arms.items()]

    def tables(self, plan: Plan, findings: dict[str, Finding]) -> list[Table]:
        tables = []
        for filler, found in _by_filler(findings).items():
            behind = f"{filler:,} frames behind the evidence"
            better = f"Share of pairs with the right one more likely, {behind}"
            more = f"Nats by which the right one is more likely, {behind}"
            tables.append(_table(better, found, "share", share))
            tables.append(_table(more, found, "margin", interval))
        return tables

    def glance(self, plan: Plan, findings: dict[str, Finding]) -> list[Table]:
        return self.tables(plan, findings)

    def draw(self, plan: Plan, findings: dict[str, Finding], figure: Figure) -> None:
        fillers = _by_filler(findings)
        kinds = list(next(iter(next(iter(fillers.values())).values())))
        rows = figure.subplots(len(fillers), len(kinds), squeeze=False)
        for (filler, found), row in zip(fillers.items(), rows, strict=True):
            for axes, kind in zip(row, kinds, strict=True):
                curves = {
                    name: ([entry["length"] for entry in of[kind]], [e["share"] for e in of[kind]])
                    for name, of in found.items()
                }
                pictures.curves(axes, curves)
                axes.set(title=f"against {kind}, {filler:,} frames later", ylim=(0, 1.02))
                axes.set_xlabel("frames heard before")
                axes.axhline(0.5, color="0.6", lw=0.8)
        rows[0, -1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _table(
    title: str, found: Mapping[str, Kinds], figure: str, shown: Callable[[Row], str]
) -> Table:
    table = Table(title=f"{title} [95% interval]")
    for name in ("", "wrong one", "pairs"):
        table.add_column(name)
    for entry in next(iter(next(iter(found.values())).values())):
        table.add_column(f"{entry['length']:,} frames", justify="right")
    for name, kinds in found.items():
        for kind, entries in kinds.items():
            counts = "/".join(str(entry["pairs"]) for entry in entries)
            table.add_row(name, kind, counts, *(shown(entry[figure]) for entry in entries))
        table.add_section()
    return table


def _by_filler(findings: Mapping[str, Finding]) -> dict[int, dict[str, Kinds]]:
    """By frames of filler and by arm."""
    found: dict[int, dict[str, Kinds]] = {}
    for name, finding in findings.items():
        for entry in Counted.from_json(finding.results["pairs"]).result():
            kinds = found.setdefault(entry["filler"], {}).setdefault(name, {})
            kinds.setdefault(entry["kind"], []).append(entry)
    return found
