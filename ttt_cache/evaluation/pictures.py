"""Curves of findings, one kind to a function; they draw into axes that are given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from .crossentropy import compared
from .findings import Finding, Row
from .measures import Span

# Okabe and Ito's palette: tells apart under every common colour blindness. Line styles tell apart
# what shares a colour.
STYLES: dict[str, dict[str, Any]] = {
    "full": {"color": "black", "lw": 2.2},
    "stock": {"color": "black", "ls": "--"},
    "extended": {"color": "black", "ls": ":"},
    "hierarchical": {"color": "#0072B2", "lw": 3.0, "zorder": 5},
    "hybrid": {"color": "#009E73", "lw": 1.8},
    "window": {"color": "#D55E00", "lw": 2.2},
    "longest": {"color": "#D55E00", "ls": "--"},
    "reset": {"color": "#D55E00", "ls": ":", "lw": 3.0},
    "sinks": {"color": "#E69F00"},
    "mean": {"color": "#CC79A7"},
    "cluster": {"color": "#CC79A7", "ls": "--"},
    "random": {"color": "#56B4E9", "ls": "--"},
}
OTHERS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "black", "0.5")


def style(name: str, number: int) -> dict[str, Any]:
    """How a curve is drawn: an arm as in every picture, another one by its number."""
    return STYLES.get(name, {"color": OTHERS[number % len(OTHERS)]})


def by_position(axes: Axes, findings: Mapping[str, Finding], window: int, context: int) -> None:
    """Cross-entropy against the position in the conversation."""
    for number, finding in enumerate(findings.values()):
        if finding.crossentropy is None:
            continue
        found = finding.crossentropy.result()
        rows = found["total"]["by_position"]
        _curve(axes, _middles(found), rows, finding.name, style(finding.name, number), shaded=False)
    axes.set_yscale("log")
    _numbers(axes.yaxis, "{x:g}")
    _frames(axes, window, context)
    axes.set(xlabel="position (frames)", ylabel="nats per frame")
    axes.set_title("Cross-entropy by position: text and all codebooks together")


def beside(
    axes: Axes, findings: Mapping[str, Finding], full: Finding, window: int, context: int
) -> None:
    """Cross-entropy beside full context's, up to the length that the model was trained on."""
    assert full.crossentropy is not None
    for number, finding in enumerate(findings.values()):
        if finding is full or finding.crossentropy is None:
            continue
        found = compared(finding.crossentropy, full.crossentropy, window)
        within = sum(end <= context for _, end in found["positions"])
        rows = found["total"]["by_position"][:within]
        places = _middles(found)[:within]
        _curve(axes, places, rows, finding.name, style(finding.name, number), shaded=False)
    _frames(axes, window)
    axes.axhline(0, color="0.6", lw=0.8)
    axes.set_ylim(-0.1, 1.0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel="position (frames)", ylabel="nats beside full context")
    axes.set_title("The same total beside full context, up to the trained length")


def by_age(axes: Axes, findings: Mapping[str, Finding], span: Span, window: int) -> None:
    """Recall against the distance of what is asked for."""
    for number, finding in enumerate(findings.values()):
        if span.name not in finding.recalls:
            continue
        bins = finding.recalls[span.name].result()["by_age"]
        places = [(entry["begin"] + entry["end"]) / 2 for entry in bins]
        rows = [entry["share"] for entry in bins]
        _curve(axes, places, rows, finding.name, style(finding.name, number), shaded=False)
    _frames(axes, window)
    axes.set_ylim(-0.02, 1.02)
    axes.set(xlabel="age of the fact (frames)", ylabel="right answers")
    axes.set_title(f"Recall against distance, {span.name}")


def by_span(axes: Axes, findings: Mapping[str, Finding], spans: Sequence[Span]) -> None:
    """Recall of far facts against the length of the conversation."""
    for number, finding in enumerate(findings.values()):
        rows = [finding.share(span) for span in spans]
        places = [float(span.end) for span in spans]
        _curve(axes, places, rows, finding.name, style(finding.name, number), marker="o")
    _frames(axes)
    axes.set_ylim(-0.02, 1.02)
    axes.set(xlabel="length of the conversation (frames)", ylabel="right answers")
    axes.set_title("Recall beyond the window")


Figures = Callable[[Finding, Span], Row]


def sweep(
    axes: Axes, findings: Mapping[str, Finding], spans: Sequence[Span], figure: Figures, label: str
) -> None:
    """A figure against the points' `x`, a curve for each series and span; points without `x` are
    drawn across."""
    for place, span in enumerate(spans):
        alpha = 1.0 if place == 0 else 0.45
        for number, (name, points) in enumerate(_series(findings.values()).items()):
            drawn = {**style(name, number), "alpha": alpha}
            title = f"{name}, {span.name}"
            if points[0].point.x is None:
                level = figure(points[0], span)[0]
                if level is not None:
                    axes.axhline(level, label=title, **drawn)
                continue
            places = [float(finding.point.x or 0) for finding in points]
            rows = [figure(finding, span) for finding in points]
            _curve(axes, places, rows, title, drawn, marker="o")
    axes.set_ylabel(label)


def listed(
    axes: Axes, findings: Mapping[str, Finding], spans: Sequence[Span], figure: Figures, label: str
) -> None:
    """A figure of points that have no order, one line each."""
    names = list(findings)
    for place, span in enumerate(spans):
        rows = [figure(finding, span) for finding in findings.values()]
        heights = [index + 0.18 * (place - (len(spans) - 1) / 2) for index in range(len(rows))]
        for row, height in zip(rows, heights, strict=True):
            value, low, high = row
            if value is None:
                continue
            colour = OTHERS[place % len(OTHERS)]
            if low is not None and high is not None:
                axes.plot([low, high], [height, height], color=colour, lw=2)
            title = span.name if height == heights[0] else None
            axes.plot(value, height, "o", color=colour, label=title)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", color="0.9")
    axes.set_xlabel(label)


def side_by_side(figure: Figure, findings: Mapping[str, Finding], spans: Sequence[Span]) -> None:
    """Recall, where there is any, and cross-entropy of points that have no order."""
    recalls = any(finding.recalls for finding in findings.values())
    axes = figure.subplots(1, 2 if recalls else 1, squeeze=False, sharey=True)[0]
    listed(axes[-1], findings, spans, lambda f, span: f.nats(span), "nats per frame")
    axes[-1].set_xscale("log")
    _numbers(axes[-1].xaxis, "{x:g}")
    if recalls:
        label = "recall beyond the window"
        listed(axes[0], findings, spans, lambda f, span: f.share(span), label)
        axes[0].set_xlim(-0.02, 1.02)
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def curves(axes: Axes, named: Mapping[str, tuple[Sequence[float], Sequence[Row]]]) -> None:
    """Places and figures of some arms."""
    for number, (name, (places, rows)) in enumerate(named.items()):
        _curve(axes, places, rows, name, style(name, number), marker="o")


def _frames(axes: Axes, window: int | None = None, context: int | None = None) -> None:
    """An axis of frames by octaves, with what is worth marking."""
    axes.set_xscale("log", base=2)
    _numbers(axes.xaxis, "{x:,.0f}")
    for place, name in ((window, "window"), (context, "trained length")):
        if place is not None:
            mark(axes, place, name)


def _numbers(axis: Axis, form: str) -> None:
    """Plain numbers, not powers."""
    axis.set_major_formatter(StrMethodFormatter(form))


def _middles(found: Mapping[str, Any]) -> list[float]:
    return [(begin + end) / 2 for begin, end in found["positions"]]


def mark(axes: Axes, place: float, text: str) -> None:
    """A line across at some place of the axis, with its name."""
    axes.axvline(place, color="0.5", lw=1, ls="-.")
    axes.text(
        place,
        1,
        f" {text}",
        transform=axes.get_xaxis_transform(),
        va="top",
        fontsize=8,
        color="0.4",
    )


def _series(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for finding in findings:
        found.setdefault(finding.point.series or finding.point.arm.name, []).append(finding)
    return found


def _curve(
    axes: Axes,
    places: Sequence[float],
    rows: Sequence[Row],
    label: str,
    drawn: Mapping[str, Any],
    shaded: bool = True,
    **more: Any,
) -> None:
    """Values with their intervals; what was not measured is left out."""
    there = [(x, *row) for x, row in zip(places, rows, strict=True) if row[0] is not None]
    if not there:
        return
    x, value, low, high = zip(*there, strict=True)
    axes.plot(x, value, label=label, **drawn, **more)
    if shaded and None not in low + high:
        axes.fill_between(x, low, high, color=drawn["color"], alpha=0.12, lw=0)
