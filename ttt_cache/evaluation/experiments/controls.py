"""The memory beside every control: what it is worth, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from ttt_cache.config import CacheConfig

from .. import pictures
from ..crossentropy import excess
from ..findings import Finding
from ..lines import Line
from ..measures import Cost, Mass, Measure, Span
from ..protocol import Point
from ..recall import relative
from ..tables import STREAMS
from .base import Experiment, Plan

REMEMBER = ("mean", "cluster", "random", "hierarchical", "hybrid")
MASS_ROWS, MASS_TIMES = 2, 2  # conversations, and contexts, in which attention is looked at


class Controls(Experiment):
    name = "controls"
    about = "The memory beside every control: recall, cross-entropy, attention mass, bytes, times."
    question = "What is the memory worth beside its controls?"
    size = 17.0, 10.5

    def points(self, plan: Plan) -> list[Point]:
        mass = Mass(MASS_ROWS, min(plan.frames, MASS_TIMES * plan.subject.context))

        def measures(name: str) -> tuple[Measure, ...]:
            return (plan.listen(), Cost(), *([mass] if name in REMEMBER else []))

        return [Point(name, arm, measures(name)) for name, arm in plan.arms().items()]

    def lines(self, plan: Plan, findings: dict[str, Finding]) -> Sequence[Line]:
        return [
            *_of_recall(plan, findings),
            *_of_crossentropy(plan, findings),
            *_of_size(plan, findings),
            *_of_controls(plan, findings),
        ]

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
    first, last = plan.spans[0], plan.spans[-1]
    mine, full = findings["hierarchical"], findings["full"]
    if not mine.recalls:
        return []
    window = findings["window"].share(first)
    lines = [Line(f"recall far, {first.name}, window alone", window[0], below=0.3)]
    targets: dict[str, dict[str, Any]] = {first.name: {"at_least": 0.98}, "at 8x": {"above": 1.0}}
    for span in plan.ends:
        value, low, high = relative(mine.recalls[span.name], full.recalls[span.name]).row()
        stock = findings["stock"].share(span)[0]
        about = f"{_between(low, high)} stock's ring: {_shown(stock)}"
        name = f"recall far, {span.name}, of full context's"
        lines.append(Line(name, value, about=about, **targets.get(span.name, {})))
    return [*lines, *_of_held(plan, findings, last)]


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
    context = plan.subject.context
    names = "hierarchical", "extended", "stock", "window", "full"
    heard = {name: found for name in names if (found := findings[name].crossentropy) is not None}
    if len(heard) < len(names):
        return []
    mine, full = heard["hierarchical"], heard["full"]
    lines = []
    if plan.window < context:
        value, low, high = excess(mine, full, plan.window, context).row()
        name = "cross-entropy over full context's, from the window's end to 1x"
        lines.append(Line(name, value, at_most=0.01, about=_between(low, high)))
        for stream in ("text", "first", "rest"):
            value, low, high = excess(mine, full, plan.window, context, stream).row()
            lines.append(Line(f"the same: {STREAMS[stream]}", value, about=_between(low, high)))
    value, low, high = findings["hierarchical"].jump(findings["full"], plan.window)
    lines.append(Line("jump of it at the window", value, at_most=0.01, about=_between(low, high)))
    if plan.frames > 4 * context:
        value, low, high = excess(mine, heard["extended"], 4 * context, None).row()
        others = (f"{name} {_shown(heard[name].mean(4 * context).row()[0])}" for name in names[:-1])
        about = f"{_between(low, high)} nats: {', '.join(others)}"
        name = "cross-entropy over the extended context's, from 4x on"
        lines.append(Line(name, value, below=0.0, about=about))
        value, low, high = excess(mine, heard["stock"], 4 * context, None).row()
        name = "cross-entropy over stock's ring's, from 4x on"
        lines.append(Line(name, value, about=_between(low, high)))
    return lines


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
    first, random = plan.spans[0], findings["random"]
    if random.crossentropy is not None:
        value, low, high = excess(random.crossentropy, window).row()
        name = "random tokens beside window only, cross-entropy"
        lines.append(Line(name, value, about=_between(low, high)))
    if random.recalls:
        value, low, high = relative(
            random.recalls[first.name], findings["window"].recalls[first.name]
        ).row()
        # "At or below": not above it by more than chance explains.
        name = f"recall far, {first.name}, random tokens over window only, least of the interval"
        about = f"{_shown(value)} {_between(low, high)}"
        lines.append(Line(name, value if low is None else low, at_most=1.0, about=about))
    return lines


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _between(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{low:.4f}, {high:.4f}]"
