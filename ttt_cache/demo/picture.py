"""The picture of the demo: what each model recalls by the age of the fact, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ttt_cache.testbed.vocabulary import VALUES

from .table import span, where

# Okabe and Ito's palette: tells apart under every common colour blindness, and in grey.
COLOURS = ("#999999", "#D55E00", "#E69F00", "#0072B2")
MARKERS = "sv^o"


def draw(result: dict[str, Any], subtitle: str, path: Path) -> None:
    """Draw the demo as a PNG.

    Args:
        result: as of `figures.as_json`.
        subtitle: says what was run, in one line.
    """
    figure = Figure(figsize=(11, 5.2), layout="constrained", dpi=150)
    figure.suptitle(
        f"{result['minutes']:.3g} minutes with a small Moshi: what it recalls, and what it costs",
        fontsize=15,
        fontweight="bold",
    )
    grid = figure.add_gridspec(2, 2, width_ratios=(7, 3))
    _draw_recall(figure.add_subplot(grid[:, 0]), result)
    arms = result["arms"]
    sizes = {
        f"{name}:\n{arm['keeps']}": arm["state_bytes_end"] / 1000 for name, arm in arms.items()
    }
    _draw_bars(figure.add_subplot(grid[0, 1]), sizes, "State of one conversation (kB)", "{:,.0f}")
    times = {name: arm["step_ms_last"] for name, arm in arms.items()}
    title = f"Step of {result['conversations']} conversations at the end (ms)"
    _draw_bars(figure.add_subplot(grid[1, 1]), times, title, "{:.1f}")
    figure.supxlabel(subtitle, fontsize=8.5, color="0.35")
    figure.savefig(path, format="png")


def _draw_recall(axes: Axes, result: dict[str, Any]) -> None:
    there = [number for number, age in enumerate(result["ages"]) if age["questions"]]
    ages = [result["ages"][number] for number in there]
    for (name, arm), colour, marker in zip(result["arms"].items(), COLOURS, MARKERS, strict=True):
        share = [arm["right"][n] / result["ages"][n]["questions"] for n in there]
        axes.plot(share, color=colour, marker=marker, lw=2.5, ms=8, label=name, alpha=0.9)
    axes.axhline(1 / VALUES, color="0.35", lw=1, ls="--")
    guess = {"xytext": (4, 3), "textcoords": "offset points", "fontsize": 9, "color": "0.35"}
    axes.annotate("a guess", (0, 1 / VALUES), **guess)
    axes.set_xticks(
        range(len(ages)),
        [f"{span(age)}\n{where(age, result)}\n{age['questions']} asked" for age in ages],
        fontsize=8,
    )
    axes.set_ylim(0, 1.15)  # with room for the legend
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_title("Right answers")
    axes.set_xlabel("how long ago the fact was told (minutes and seconds)")
    axes.legend(loc="upper center", ncols=4, frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_bars(axes: Axes, values: dict[str, float], title: str, text: str) -> None:
    bars = axes.barh(list(values), list(values.values()), color=COLOURS)
    axes.bar_label(bars, [text.format(value) for value in values.values()], padding=3)
    axes.set_xlim(0, max(values.values()) * 1.2)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
