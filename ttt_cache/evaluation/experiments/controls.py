"""The memory beside every control: what it is worth, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from ttt_cache.config import CacheConfig

from .. import pictures
from ..crossentropy import excess, jump
from ..findings import Finding
from ..lines import Line
from ..measures import Cost, Mass, Measure
from ..protocol import Point
from ..recall import relative
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
    lines = [Line(f"recall far, {first.name}, window alone", window[0], at_most=0.3)]
    for span, least in {first: 0.98, last: 1.0 if last is not first else 0.98}.items():
        value, low, high = relative(mine.recalls[span.name], full.recalls[span.name]).row()
        lines.append(
            Line(
                f"recall far, {span.name}, of full context's",
                value,
                at_least=least,
                about=_between(low, high),
            )
        )
    return lines


def _of_crossentropy(plan: Plan, findings: dict[str, Finding]) -> list[Line]:
    context = plan.subject.context
    mine, full, extended = (
        findings[name].crossentropy for name in ("hierarchical", "full", "extended")
    )
    if mine is None or full is None or extended is None:
        return []
    value, low, high = excess(mine, full, 0, context).row()
    over = Line(
        "cross-entropy over full context's, up to 1x",
        value,
        at_most=0.01,
        about=_between(low, high),
    )
    value, low, high = jump(mine, full, plan.window).row()
    lines = [
        over,
        Line("jump of it at the window", value, at_most=0.01, about=_between(low, high)),
    ]
    if plan.frames > 4 * context:
        value, low, high = excess(mine, extended, 4 * context, None).row()
        lines.append(
            Line(
                "cross-entropy over the extended context's, from 4x on",
                value,
                at_most=0.0,
                about=_between(low, high),
            )
        )
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
    assert reset is not None and window is not None
    value = abs(excess(reset, window).row()[0] or 0.0)
    lines = [Line("memory reset beside window only, cross-entropy", value, at_most=1e-6)]
    first = plan.spans[0]
    mine, theirs = findings["random"].share(first), findings["window"].share(first)
    if mine[0] is not None:  # "at or below": not above what the window's own interval allows
        about = f"the window's is {theirs[0]:.4f}, at most its interval's end"
        name = f"recall far, {first.name}, random tokens"
        lines.append(Line(name, mine[0], at_most=theirs[2], about=about))
    return lines


def _between(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{low:.4f}, {high:.4f}]"
