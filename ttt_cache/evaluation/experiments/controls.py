"""The memory beside every control: what it is worth, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from ttt_cache.config import CacheConfig

from .. import pictures
from ..crossentropy import excess
from ..findings import Finding, Row
from ..lines import Line
from ..measures import Cost, Mass, Measure, Span
from ..protocol import Point
from ..recall import apart_by, relative
from ..tables import STREAMS
from .base import Experiment, Plan

OFTEN = ("full", "window", "random", "hierarchical")  # what targets set side by side
REMEMBER = ("mean", "cluster", "random", "hierarchical", "hybrid")
MOST_BY_CHANCE = 0.02  # of recall: random tokens are beside the window, give or take a guess
MASS_ROWS, MASS_TIMES = 2, 2  # conversations, and contexts, in which attention is looked at


class Controls(Experiment):
    name = "controls"
    about = "The memory beside every control: recall, cross-entropy, attention mass, bytes, times."
    question = "What is the memory worth beside its controls?"
    size = 17.0, 10.5

    def points(self, plan: Plan) -> list[Point]:
        mass = Mass(MASS_ROWS, min(plan.frames, MASS_TIMES * plan.subject.context))

        def measures(name: str) -> tuple[Measure, ...]:
            early = [plan.early()] if plan.subject.is_testbed and name in OFTEN else []
            return (plan.listen(), *early, Cost(), *([mass] if name in REMEMBER else []))

        return [Point(name, arm, measures(name)) for name, arm in plan.arms().items()]

    def lines(self, plan: Plan, findings: dict[str, Finding]) -> Sequence[Line]:
        heard = [
            *_of_recall(plan, findings),
            *_of_crossentropy(plan, findings),
            *_of_controls(plan, findings),
        ]
        if plan.frames < plan.subject.context:  # targets are of whole contexts
            heard = [line.unmeasured() for line in heard]
        return [*heard, *_of_size(plan, findings)]

    def draw(self, plan: Plan, findings: dict[str, Finding], figure: Figure) -> None:
        recalls = any(finding.recalls for finding in findings.values())
        axes = figure.subplots(2 if recalls else 1, 2, squeeze=False)
        context, full = plan.subject.context, findings["full"]
        pictures.by_position(axes[0, 0], findings, plan.window, context)
        pictures.beside(axes[0, 1], findings, full, plan.window, context)
        if recalls:
            pictures.by_age(axes[1, 0], findings, plan.spans[0], plan.window)
            pictures.by_span(axes[1, 1], findings, plan.spans)
        handles, names = axes[0, 0].get_legend_handles_labels()
        axes[0, 1].legend(handles, names, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))


def _of_recall(plan: Plan, findings: dict[str, Finding]) -> list[Line]:
    if not findings["hierarchical"].recalls:
        return []
    first, spans = plan.spans[0], {span.name: span for span in plan.spans}
    window = findings["window"].early.share(first)
    begins, stock = _beside_full(findings, first, early=True), findings["stock"].share(first)
    lines = [
        _line(f"recall far, {first.name}, window alone", window, below=0.3),
        _line(
            f"recall far, {first.name}, of full context's",
            begins,
            f" stock's ring: {_shown(stock[0])}",
            at_least=0.98,
        ),
    ]
    name = "recall far, at 8x, of full context's"
    if (last := spans.get("at 8x")) is None:
        return [*lines, Line(name, None, above=1.0)]
    about = f" stock's ring: {_shown(findings['stock'].share(last)[0])}"
    lines.append(_line(name, _beside_full(findings, last), about, above=1.0))
    return [*lines, *_of_held(plan, findings, last)]


def _beside_full(findings: dict[str, Finding], span: Span, early: bool = False) -> Row:
    """Recall of far facts over full context's."""
    mine, full = (findings[name] for name in ("hierarchical", "full"))
    if early:
        mine, full = mine.early, full.early
    return relative(mine.recalls[span.name], full.recalls[span.name]).row()


def _of_held(plan: Plan, findings: dict[str, Finding], span: Span) -> list[Line]:
    """Recall of facts that have left stock Moshi's ring; there are many at the level `held`."""
    octave = math.ceil(math.log2(plan.subject.context))  # the first one wholly beyond it
    shares = {
        name: findings[name].recalls[span.name].share("age", octave).row()
        for name in ("hierarchical", "stock", "full")
    }
    value, low, high = shares["hierarchical"]
    if value is None:
        return []
    beside = f"stock's ring: {_shown(shares['stock'][0])}, full: {_shown(shares['full'][0])}"
    name = f"recall of facts older than {2**octave:,} frames, {span.name}"
    return [Line(name, value, about=f"{_between(low, high)} {beside}")]


def _of_crossentropy(plan: Plan, findings: dict[str, Finding]) -> list[Line]:
    mine, full = findings["hierarchical"].early, findings["full"].early
    if mine.crossentropy is None:
        return []
    first = plan.spans[0]
    lines = []
    if plan.window < first.end:
        within = Span("", plan.window, first.end)
        name = f"cross-entropy over full context's, from the window's end to {first.name}"
        lines.append(_line(name, mine.excess(full, within), at_most=0.01))
        for stream in ("text", "first", "rest"):
            name = f"the same: {STREAMS[stream]}"
            lines.append(_line(name, mine.excess(full, within, stream)))
    lines.append(_line("jump of it at the window", mine.jump(full, plan.window), at_most=0.01))
    return [*lines, *_of_later(plan, findings)]


def _of_later(plan: Plan, findings: dict[str, Finding]) -> list[Line]:
    """Cross-entropy from four times the context on."""
    begin = 4 * plan.subject.context
    name = "cross-entropy over the extended context's, from 4x on"
    if plan.frames <= begin:
        return [Line(name, None, below=0.0)]
    later, mine = Span("from 4x on", begin, plan.frames), findings["hierarchical"]
    arms = "hierarchical", "extended", "stock", "window"
    nats = ", ".join(f"{arm} {_shown(findings[arm].nats(later)[0])}" for arm in arms)
    beside = "cross-entropy over stock's ring's, from 4x on"
    return [
        _line(name, mine.excess(findings["extended"], later), f" nats: {nats}", below=0.0),
        _line(beside, mine.excess(findings["stock"], later)),
    ]


def _line(name: str, row: Row, more: str = "", **target: Any) -> Line:
    return Line(name, row[0], about=_between(*row[1:]) + more, **target)


def _of_size(plan: Plan, findings: dict[str, Finding]) -> list[Line]:
    """How small the window and the state are."""
    config = CacheConfig.from_fields(plan.subject.settings)
    cost, ring = (findings[name].results["cost"] for name in ("hierarchical", "stock"))
    share = cost["state_bytes"] / ring["state_bytes"]
    lines = [Line("state, share of the ring's bytes", share, at_most=1 / 8)]
    if isinstance(config.recent, int):
        recent = config.recent / plan.subject.context
        lines.insert(0, Line("recent, share of the context", recent, at_most=1 / 16))
    return lines


def _of_controls(plan: Plan, findings: dict[str, Finding]) -> list[Line]:
    """Whether each control is where it should be."""
    reset, window = findings["reset"].crossentropy, findings["window"].crossentropy
    if reset is None or window is None:
        return []
    apart = excess(reset, window).row()[0]
    name = "memory reset beside window only, cross-entropy"
    lines = [Line(name, None if apart is None else abs(apart), at_most=1e-6)]
    random, alone = findings["random"], findings["window"]
    name = "random tokens over window only, cross-entropy"
    lines.append(_line(name, random.excess(alone, Span("", 0, plan.frames)), at_least=0.0))
    if random.recalls:
        first = plan.spans[0]
        pair = random.early.recalls[first.name], alone.early.recalls[first.name]
        value, low, high = apart_by(*pair).row()
        # "At or below": not above it by more than chance explains.
        name = f"recall far, {first.name}, random tokens less window only, most of the interval"
        about = f"{_shown(value)} {_between(low, high)}"
        lines.append(Line(name, high, at_most=MOST_BY_CHANCE, about=about))
    return lines


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _between(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{low:.4f}, {high:.4f}]"
