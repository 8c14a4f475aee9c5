"""The picture of a conversation: size of the state, and time per step, over its minutes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .conversation import Record
from .figures import FRAME_SECONDS, figures, spans

# Okabe and Ito's palette: tells apart under every common colour blindness, and in grey.
COLOURS = {"stock": "#D55E00", "patched": "#0072B2"}
GROUPS = 60  # points on the curve of step times
SMALLEST = 20  # frames in a group


def draw(record: Record, context: int, subtitle: str, path: Path) -> None:
    """Draw a conversation as a PNG.

    Args:
        context: frames of the stock model's ring.
        subtitle: says what was run, in one line.
    """
    sizes = [figures(arm).state_bytes_end / 1e6 for arm in (record.stock, record.patched)]
    figure = Figure(figsize=(11, 5.2), layout="constrained", dpi=150)
    minutes = record.frames * FRAME_SECONDS / 60
    length = f"{minutes:.3g} minutes" if minutes >= 1 else f"{minutes * 60:.3g} seconds"
    figure.suptitle(
        f"{length} with a small Moshi: {sizes[0]:.1f} MB of state, patched {sizes[1]:.1f} MB",
        fontsize=15,
        fontweight="bold",
    )
    left, right = figure.subplots(1, 2)
    _draw_sizes(left, record)
    _draw_times(right, record)
    full = context * FRAME_SECONDS / 60
    for axes in (left, right):
        _finish(axes, minutes)
        if full < minutes:
            _mark(axes, full, f"{context} frames:\nstock starts to forget" if axes is left else "")
    figure.supxlabel(subtitle, fontsize=8.5, color="0.35")
    figure.savefig(path, format="png")


def _draw_sizes(axes: Axes, record: Record) -> None:
    minutes = np.array(record.sampled) * FRAME_SECONDS / 60
    for name, colour in COLOURS.items():
        size = np.array(getattr(record, name).state_bytes) / 1e6
        axes.plot(minutes, size, color=colour, lw=2.5, marker="o", ms=3, label=name)
        axes.annotate(
            f"{name}: {size[-1]:,.1f} MB",
            (minutes[0], size[0]),
            xytext=(8, 8),
            textcoords="offset points",
            color=colour,
            fontweight="bold",
        )
    axes.set_ylim(0, max(record.stock.state_bytes + record.patched.state_bytes) * 1.2 / 1e6)
    axes.set_title("Streaming state, measured every 100 frames")
    axes.set_ylabel("state of one conversation (MB)")


def _draw_times(axes: Axes, record: Record) -> None:
    start = spans(record.frames)[0].start  # without the warm-up
    groups = min(GROUPS, max(1, (record.frames - start) // SMALLEST))
    edges = np.linspace(start, record.frames, groups + 1).astype(int)
    middle = (edges[:-1] + edges[1:]) / 2 * FRAME_SECONDS / 60
    highest = 0.0
    for name, colour in COLOURS.items():
        parts = np.split(getattr(record, name).seconds[start:] * 1000, edges[1:-1] - start)
        median, p99 = np.array([np.percentile(part, [50, 99]) for part in parts]).T
        axes.plot(middle, median, color=colour, lw=2.5, label=f"{name}, median")
        axes.fill_between(
            middle, median, p99, color=colour, alpha=0.18, lw=0, label=f"{name}, up to p99"
        )
        highest = max(highest, float(np.percentile(p99, 90)))  # a hiccup must not set the scale
    axes.set_ylim(0, highest * 1.4)
    axes.set_title(f"Time per step, in groups of {np.diff(edges).max()} frames")
    axes.set_ylabel("time per step (ms); a frame lasts 80 ms")
    axes.legend(loc="upper right", ncols=2, framealpha=0.9, edgecolor="none", fontsize=9)


def _finish(axes: Axes, minutes: float) -> None:
    axes.set_xlim(0, minutes)
    axes.set_xlabel("length of the conversation (minutes)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _mark(axes: Axes, minute: float, label: str) -> None:
    axes.axvline(minute, color="0.35", lw=1, ls="--")
    axes.annotate(
        label,
        (minute, axes.get_ylim()[1]),
        xytext=(5, -5),
        textcoords="offset points",
        va="top",
        color="0.35",
        fontsize=9,
    )
