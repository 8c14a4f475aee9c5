"""100,000 frames, two hours and more: no growth, no drift, no collapse."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from .. import pictures
from ..collapse import SHARE as COLLAPSED
from ..collapse import collapse
from ..crossentropy import drift
from ..findings import Finding
from ..freerun import divergence, require_user
from ..freerun import drift as drift_of_speech
from ..intervals import Interval
from ..lines import Line
from ..measures import Span, Speak
from ..protocol import Point
from ..subject import Subject
from ..tables import STREAMS, nats_table, parts_table, recall_table, slope_table
from .base import Experiment, Plan

FRAMES = 100_000
SPEAKING = "stock", "extended", "window", "hierarchical"  # many minutes each, step by step
SPEAKING_ROWS = 1
PARTS = 10  # of a conversation, between which cross-entropy may drift
MOST = 0.02  # of its drift


class Unbounded(Experiment):
    name = "unbounded"
    about = "100,000 frames: state, cross-entropy, recall, and what Moshi says for itself."
    question = "Does anything grow, drift or collapse in 100,000 frames?"
    rows = 8
    beside = "stock"  # whoever keeps every frame takes hours for 100,000

    def frames(self, subject: Subject) -> int:
        return max(FRAMES, super().frames(subject))

    def points(self, plan: Plan) -> list[Point]:
        require_user(plan.subject.lm)
        arms, speak = plan.arms(), Speak(SPEAKING_ROWS, plan.frames)
        del arms["full"]
        return [
            Point(name, arm, (plan.listen(), *([speak] if name in SPEAKING else [])))
            for name, arm in arms.items()
        ]

    def tables(self, plan: Plan, findings: dict[str, Finding]) -> list[Table]:
        tables = [nats_table(findings, plan.spans, self.beside, plan.spans)]
        tables += [parts_table(findings, span) for span in plan.ends]
        tables.append(slope_table(findings, plan.window))
        if any(finding.recalls for finding in findings.values()):
            tables.insert(0, recall_table(findings, plan.spans))
        spoken = {name: f for name, f in findings.items() if "speak" in f.results}
        return [*tables, _spoken(spoken)] if spoken else tables

    def lines(self, plan: Plan, findings: dict[str, Finding]) -> Sequence[Line]:
        mine = findings["hierarchical"]
        run, reference = mine.results["speak"], findings["stock"].results["speak"]
        size = run["state_bytes"]
        found, beside = collapse(run, reference), collapse(reference, reference["recorded"])
        recorded = collapse(run, run["recorded"])
        lines = [
            Line("growth of state (bytes)", size["most"] - size["start"], at_most=0),
            *_drifts(mine, findings["stock"], plan.frames),
            Line(
                "windows in which it collapses, beside stock Moshi's, share",
                found,
                at_most=COLLAPSED,
                about=f"of stock Moshi's own, beside what was recorded: {beside:.3f}",
            ),
            Line("the same beside what was recorded", recorded, at_most=COLLAPSED),
        ]
        return lines if plan.frames >= FRAMES else [line.unmeasured() for line in lines]

    def draw(self, plan: Plan, findings: dict[str, Finding], figure: Figure) -> None:
        axes = figure.subplots(1, 3)
        _tenths(axes[0], plan, findings)
        if any(finding.recalls for finding in findings.values()):
            pictures.by_span(axes[1], findings, plan.spans)
        _repetition(axes[2], findings)
        axes[0].legend(fontsize=8)


def _drifts(mine: Finding, stock: Finding, frames: int) -> list[Line]:
    """From the second tenth of a conversation, and from the first, to the last."""
    heard, beside = mine.crossentropy, stock.crossentropy
    if heard is None or beside is None:
        return []
    part = frames // PARTS
    first, second, last = (0, part), (part, 2 * part), (frames - part, frames)
    what = "drift of cross-entropy, last tenth over the"
    lines = []
    for name, part in (("first", first), ("second", second)):
        # Beside stock Moshi, whose ring cannot drift: some stretches are harder than others.
        found = drift(heard, part, last, beside)
        lines.append(_drift(f"{what} {name}, beside stock Moshi's", found, at_most=MOST))
        lines.append(_drift(f"{what} {name}, alone", drift(heard, part, last)))
    for measure in ("text", "first", "rest"):
        found = drift(heard, first, last, beside, measure)
        lines.append(_drift(f"{what} first, beside stock Moshi's: {STREAMS[measure]}", found))
    return lines


def _drift(name: str, found: Interval, at_most: float | None = None) -> Line:
    """Of either sign."""
    value, low, high = found.row()
    about = "" if low is None or high is None else f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"
    return Line(name, None if value is None else abs(value), at_most=at_most, about=about)


def _tenths(axes: Axes, plan: Plan, findings: dict[str, Finding]) -> None:
    edges = [plan.frames * part // PARTS for part in range(PARTS + 1)]
    for number, finding in enumerate(findings.values()):
        if finding.crossentropy is None:
            continue
        spans = [Span("", *pair) for pair in pairwise(edges)]
        nats = [finding.nats(span)[0] or float("nan") for span in spans]
        places = [(span.begin + span.end) / 2 for span in spans]
        axes.plot(places, nats, label=finding.name, **pictures.style(finding.name, number))
    axes.set(xlabel="position (frames)", ylabel="nats per frame", title="Cross-entropy over time")


def _repetition(axes: Axes, findings: dict[str, Finding]) -> None:
    """Of what Moshi says for itself, window by window, the first row."""
    for number, finding in enumerate(findings.values()):
        run = finding.results.get("speak")
        if run is None:
            continue
        windows = [window for window in run["windows"] if window["row"] == 0]
        starts = [window["start"] for window in windows]
        entropies = [window["said"]["entropy"] for window in windows]
        axes.plot(starts, entropies, label=finding.name, **pictures.style(finding.name, number))
    axes.set(xlabel="frame", ylabel="bits", title="Entropy of what Moshi says for itself")


def _spoken(findings: dict[str, Finding]) -> Table:
    """What the arms say for themselves, beside stock Moshi."""
    table = Table(title="Moshi speaking for itself")
    table.add_column("")
    titles = ("state at start (kB)", "at end", "step p50 (ms)", "p99", "silence", "text entropy")
    for title in (
        *titles,
        "distinct",
        "repeated",
        "collapsed windows",
        "from stock (bits)",
        "drift",
    ):
        table.add_column(title, justify="right")
    reference = findings["stock"].results["speak"]
    for finding in findings.values():
        run = finding.results["speak"]
        size, steps = run["state_bytes"], run["step_ms"]
        cells = [f"{size['start'] / 1e3:,.1f}", f"{size['end'] / 1e3:,.1f}"]
        cells += [f"{steps['p50']:.2f}", f"{steps['p99']:.2f}", _mean(run, "silence")]
        cells += [_mean(run, "said", name) for name in ("entropy", "distinct", "repeated")]
        standard = run["recorded"] if run is reference else reference
        cells.append(f"{collapse(run, standard):.3f}")
        apart = _bits(divergence(run, reference)["said"]["1"])
        table.add_row(finding.name, *cells, apart, _bits(drift_of_speech(run)["said"]["1"]))
    return table


def _mean(run: dict, *path: str) -> str:
    values = []
    for window in run["windows"]:
        value = window
        for name in path:
            value = value[name]
        if value is not None:
            values.append(value)
    return f"{sum(values) / len(values):.3f}" if values else "-"


def _bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
