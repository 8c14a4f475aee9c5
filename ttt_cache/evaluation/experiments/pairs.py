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
ARMS = ("full", "stock", "extended", "window", "hierarchical")


class Pairs(Experiment):
    name = "pairs"
    about = "Is what is right likelier than what is wrong? After 8, 16 and 32 thousand frames."
    question = "Is what was told long ago still the likelier continuation?"

    def frames(self, subject: Subject) -> int:
        return LENGTHS[-1]

    def points(self, plan: Plan) -> list[Point]:
        whole_number("--rows of pairs", plan.rows, 2)  # what is told apart is two conversations
        whole_number("--frames of pairs", plan.frames, SEGMENT)
        lengths = (*(n for n in LENGTHS if n < plan.frames), plan.frames)
        measure = Paired(plan.rows, lengths, plan.subject.far)
        arms = plan.subject.arms(plan.frames + plan.subject.far + SEGMENT)  # questions come behind
        return [Point(name, arms[name], (measure,)) for name in ARMS]

    def tables(self, plan: Plan, findings: dict[str, Finding]) -> list[Table]:
        found = {name: _by_kind(finding) for name, finding in findings.items()}
        better = "Share of pairs with the right one more likely"
        return [
            _table(better, found, "share", share),
            _table("Nats by which the right one is more likely", found, "margin", interval),
        ]

    def draw(self, plan: Plan, findings: dict[str, Finding], figure: Figure) -> None:
        found = {name: _by_kind(finding) for name, finding in findings.items()}
        kinds = list(next(iter(found.values())))
        every = figure.subplots(1, len(kinds), squeeze=False)[0]
        for axes, kind in zip(every, kinds, strict=True):
            curves = {
                name: ([entry["length"] for entry in of[kind]], [e["share"] for e in of[kind]])
                for name, of in found.items()
            }
            pictures.curves(axes, curves)
            axes.set(title=f"against {kind}", xlabel="frames heard before", ylim=(0, 1.02))
            axes.axhline(0.5, color="0.6", lw=0.8)
        every[0].legend(fontsize=8)


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


def _by_kind(finding: Finding) -> Kinds:
    found: Kinds = {}
    for entry in Counted.from_json(finding.results["pairs"]).result():
        found.setdefault(entry["kind"], []).append(entry)
    return found
