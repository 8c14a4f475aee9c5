"""The picture of a benchmark: time and state against context, throughput against batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .measure import Row

# Okabe and Ito's palette: tells apart under every common colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "0.5")


def draw(rows: Sequence[Row], subtitle: str, path: Path) -> None:
    """Draw the rows as a PNG.

    Args:
        subtitle: says what was run, in one line.
    """
    figure = Figure(figsize=(13, 4.6), layout="constrained", dpi=150)
    figure.suptitle("One attention core of Moshi", fontsize=15, fontweight="bold")
    time, state, throughput = figure.subplots(1, 3)
    largest = max(row.batch for row in rows)
    of_largest = [row for row in rows if row.batch == largest]
    title = f"Step at batch {largest} (ms)"
    _by_context(time, of_largest, lambda row: row.step_ms, title)
    size = "State of one conversation (MB)"
    _by_context(state, of_largest, lambda row: row.state_bytes / 1e6, size)
    _by_batch(throughput, rows)
    figure.legend(*throughput.get_legend_handles_labels(), loc="outside right", frameon=False)
    figure.supxlabel(subtitle, fontsize=8.5, color="0.35")
    figure.savefig(path, format="png")


def _by_context(axes: Axes, rows: Sequence[Row], value: Callable[[Row], float], title: str) -> None:
    """Stock rings by their length; an arm whose state never grows is a line from end to end."""
    stock = [row for row in rows if row.context is not None]
    contexts = [row.context or 0 for row in stock]
    axes.plot(contexts, [value(row) for row in stock], color="black", marker="s")
    others = [row for row in rows if row.context is None]
    for row, colour in zip(others, _colours(len(others)), strict=True):
        axes.plot([0, max(contexts)], [value(row)] * 2, color=colour, lw=2)
    axes.set(xlabel="frames that are remembered", title=title, xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.25)


def _by_batch(axes: Axes, rows: Sequence[Row]) -> None:
    names = list(dict.fromkeys(row.arm for row in rows if row.context is None))
    stock = list(dict.fromkeys(row.arm for row in rows if row.context is not None))
    styles: list[dict[str, Any]] = [{"color": "black", "ls": line} for line in _lines(len(stock))]
    styles += [{"color": colour, "lw": 2} for colour in _colours(len(names))]
    for name, style in zip(stock + names, styles, strict=True):
        mine = [row for row in rows if row.arm == name]
        points = [row.batch for row in mine], [row.frames_per_second for row in mine]
        axes.plot(*points, marker="o", ms=4, label=name, **style)
    axes.set(xlabel="conversations at once", title="Frames a second", xscale="log", yscale="log")
    batches = sorted({row.batch for row in rows})
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.minorticks_off()
    axes.grid(alpha=0.25)


def _colours(number: int) -> list[str]:
    return [COLOURS[one % len(COLOURS)] for one in range(number)]


def _lines(number: int) -> list[str]:
    return [("-", "--", ":", "-.")[one % 4] for one in range(number)]
