"""The picture of a load: latency, and late frames, against conversations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ..picture import COLOURS
from .figures import FRAME_MS, Level
from .table import ordered

LATE, P50, P95, P99 = "0.4", COLOURS[5], COLOURS[0], COLOURS[1]


def draw(levels: Sequence[Level], answer: str, held: int | None, subtitle: str, path: Path) -> None:
    """Draw the levels as a PNG.

    Args:
        answer: conversations in real time, in words.
        held: the same as a number; `None`: unknown.
        subtitle: says what was run, in one line.
    """
    figure = Figure(figsize=(11, 4.8), layout="constrained", dpi=150)
    figure.suptitle(f"Conversations held in real time: {answer}", fontsize=15, fontweight="bold")
    time, late = figure.subplots(1, 2, width_ratios=(2, 1))
    _times(time, [level for level in ordered(levels) if level.frames])
    _late(late, ordered(levels))
    for axes in (time, late):
        most = max((level.clients for level in levels), default=1)
        axes.set(xlabel="conversations at once", xlim=(0, 1.05 * most))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.grid(alpha=0.25)
        if held:
            axes.axvline(held, color="black", lw=1, ls=":")
    figure.supxlabel(subtitle, fontsize=8.5, color="0.35")
    figure.savefig(path, format="png")


def _times(axes: Axes, measured: Sequence[Level]) -> None:
    """What is infinite has no point: its line ends."""
    for name, colour in (("p99", P99), ("p95", P95), ("p50", P50)):
        values = [getattr(level, f"{name}_ms") for level in measured]
        clients = [level.clients for level in measured]
        axes.plot(clients, values, color=colour, marker="o", ms=4, label=name)
    axes.axhline(FRAME_MS, color="black", ls="--", lw=1, label="a frame, 80 ms")
    shown = [ms for n in measured for ms in (n.p50_ms, n.p99_ms) if ms and math.isfinite(ms)]
    low, high = min([10.0, *shown]), max([FRAME_MS, *shown])  # wide enough for several ticks
    axes.set(title="From due to answered (ms)", yscale="log", ylim=(low / 1.2, high * 1.3))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False)


def _late(axes: Axes, levels: Sequence[Level]) -> None:
    shares = [(n.clients, 100 * n.late_share) for n in levels if n.late_share is not None]
    axes.plot(
        [clients for clients, _ in shares],
        [late for _, late in shares],
        color=LATE,
        marker="o",
        ms=4,
        clip_on=False,
    )
    turned_away = [level.clients for level in levels if level.refused]
    if turned_away:
        axes.plot(turned_away, [100] * len(turned_away), "x", color=P99, label="refused")
        axes.legend(frameon=False)
    most = max((late for _, late in shares), default=0.0)
    if shares and not most:
        axes.text(0.5, 0.5, "no late frames", transform=axes.transAxes, ha="center", color=LATE)
    axes.set(title="Late frames (%)", ylim=(0, 105 if turned_away else max(1.05 * most, 1)))
