"""The picture of a training run: its losses, and what the memory did in every layer meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from ttt_cache.files import write_whole

from .curves import Curve, Run, read_run, smoothed
from .metrics import NAME
from .result import LEAST_MASS

PICTURE = "training.png"
# Okabe and Ito's palette: tells apart under every common colour blindness, and in grey.
LOSSES = {
    "loss": ("total", "#000000"),
    "text_loss": ("text", "#D55E00"),
    "audio_loss": ("audio", "#0072B2"),
    "kl": ("distance to full context", "#009E73"),
}
EVALUATED = "#CC79A7"
# Light at the bottom of the model, dark at its top; without the yellows that white drowns.
DEPTH = ListedColormap(colormaps["viridis_r"](np.linspace(0.12, 1, 256)))
LAYERED = {
    "gate": ("How far the gate is open", "openness"),
    "ratio": ("What the memory adds, beside the window", "memory / window (rms)"),
    "mass": ("How much of a query goes to the memory", "attention mass on memory"),
}


def draw(run_dir: Path) -> Path:
    """Draw `run_dir/metrics.jsonl` as `run_dir/training.png`.

    Four panels over steps: losses (and errors of distillation); openness of the gate, ratio of the
    branches and attention mass on the memory of each layer. A panel without figures says so.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line of it is damaged; the message names file and line.
    """
    run = read_run(run_dir / NAME)
    depths = run.depths((*LAYERED, "error"))
    norm = Normalize(depths[0], depths[-1]) if len(depths) > 1 else Normalize(-1, 0)
    figure = Figure(figsize=(12, 8), layout="constrained", dpi=130)
    figure.suptitle(f"Training run {run_dir.resolve().name}", fontsize=15, fontweight="bold")
    panels = list(figure.subplots(2, 2, sharex=True).flat)
    _draw_losses(panels[0], run, norm)
    for axes, name in zip(panels[1:], LAYERED, strict=True):
        _draw_layers(axes, run, name, norm)
    for axes in panels:
        _mark(axes, run, named=axes is panels[0])
        axes.set_xlim(0, 1.01 * run.last)  # the last point whole
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[2:]:
        axes.set_xlabel("optimizer steps")
    if len(depths) > 1:
        bar = figure.colorbar(ScalarMappable(norm, DEPTH), ax=panels, aspect=60, shrink=0.9)
        bar.set_label("layer, 0 at the bottom of the model")
        few = np.linspace(depths[0], depths[-1], 5).round().tolist()
        bar.set_ticks(depths if len(depths) <= 8 else few)
    path = run_dir / PICTURE
    write_whole({path: lambda temporary: figure.savefig(temporary, format="png")})
    return path


def _draw_losses(axes: Axes, run: Run, norm: Normalize) -> None:
    axes.set_title("Loss")
    errors = run.layers("error")
    for layer, curve in errors.items():
        _plot(axes, smoothed(curve), DEPTH(norm(layer)), None, lw=1)
    for name, (label, colour) in LOSSES.items():
        if name in run.curves:
            curve = run.curves[name]
            smooth = smoothed(curve)
            if smooth is not curve:
                axes.plot(*curve, color=colour, lw=0.6, alpha=0.25)
            _plot(axes, smooth, colour, label, lw=2)
    if "eval/loss" in run.curves:
        axes.plot(
            *run.curves["eval/loss"], color=EVALUATED, lw=1, marker="o", ms=5, label="evaluated"
        )
    if errors:
        axes.plot([], [], color=DEPTH(0.7), lw=1, label="error of each layer (distillation)")
    if not _highest(axes):
        _explain(axes, run, "no finite loss was recorded")
        return
    axes.set_ylabel("loss")
    if _highest(axes) > 10 * _lowest(axes) > 0:  # early losses would flatten the rest
        axes.set_yscale("log")
        axes.set_ylabel("loss, logarithmic")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="best", framealpha=0.9, edgecolor="none", fontsize=9)


def _draw_layers(axes: Axes, run: Run, name: str, norm: Normalize) -> None:
    title, label = LAYERED[name]
    axes.set_title(title)
    for layer, curve in run.layers(name).items():
        _plot(axes, curve, DEPTH(norm(layer)), None, lw=1.4)
    if not axes.lines:
        _explain(axes, run, "the memory was not observed")
        return
    axes.set_ylabel(label)
    axes.set_ylim(0, 1.1 * _highest(axes) or 1)
    if name == "mass":
        axes.axhline(LEAST_MASS, color="0.35", lw=1, ls=":")
        axes.annotate(
            f"{LEAST_MASS:.0%}: with less in all layers the memory is shut out",
            (0, LEAST_MASS),
            xytext=(4, 2),
            textcoords="offset points",
            fontsize=8,
            color="0.35",
        )


def _plot(axes: Axes, curve: Curve, colour: Any, label: str | None, lw: float) -> None:
    marker = "o" if len(curve.steps) <= 20 else None  # a single point has no line
    axes.plot(*curve, color=colour, lw=lw, marker=marker, ms=3, label=label)


def _values(axes: Axes) -> np.ndarray:
    """What is drawn, as far as it is finite."""
    drawn = [np.asarray(line.get_ydata(), dtype=float) for line in axes.lines]
    values = np.concatenate([np.empty(0), *drawn])
    return values[np.isfinite(values)]


def _highest(axes: Axes) -> float:
    return float(max(_values(axes), default=0))


def _lowest(axes: Axes) -> float:
    return float(min(_values(axes), default=0))


def _explain(axes: Axes, run: Run, what: str) -> None:
    steps = f"in any of the {run.last} steps" if run.stages else "as there are no steps"
    style: dict[str, Any] = {"ha": "center", "color": "0.35"}
    axes.text(0.5, 0.5, f"{what} {steps}", transform=axes.transAxes, **style)
    axes.set_yticks([])


def _mark(axes: Axes, run: Run, named: bool) -> None:
    """Where stages begin; a run of one stage needs no mark."""
    if len(run.stages) < 2:
        return
    for step, stage in run.stages:
        axes.axvline(step, color="0.35", lw=1, ls="--")
        if named:
            axes.annotate(
                stage,
                (step, 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, -4),
                textcoords="offset points",
                rotation=90,
                va="top",
                fontsize=8,
                color="0.35",
            )
