"""An experiment from its plan to its files."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from ttt_cache.files import write_whole

from .circumstances import circumstances
from .experiments import Experiment, Plan
from .findings import Finding, read
from .hashes import base_hash
from .lines import Line, table_of
from .protocol import Bench, Point, as_json
from .recipe import DEFAULT, HYBRID, SWEEP

WIDTH = 170  # of tables where the terminal does not say


def conduct(
    experiment: Experiment,
    plan: Plan,
    points: list[Point],
    bench: Bench,
    out: Path,
    only: Collection[str] | None = None,
) -> None:
    """Measure the points of an experiment; with all of them, print its tables and write
    `NAME.json` and `NAME.png` into `out`.

    Args:
        points: `experiment.points(plan)`.
        only: names of points: these are measured, and shown without what compares all.
    """
    found = bench.evaluate(points, only)
    console = Console(width=None if Console().is_terminal else WIDTH)
    findings = read(points, found)
    if only is not None and len(found) < len(points):
        for table in experiment.glance(plan, findings):
            console.print(table)
        console.print(f"Kept: {', '.join(found)}. Without --only the same command shows all.")
        return
    for table in experiment.tables(plan, findings):
        console.print(table)
    lines = list(experiment.lines(plan, findings)) if plan.subject.is_testbed else []
    if lines:
        console.print(table_of(lines))
    for name, about in {point.arm.name: point.arm.about for point in points}.items():
        console.print(f"{name}: {about}", highlight=False)
    _write(experiment, plan, findings, lines, out)
    for suffix in ("json", "png"):
        console.print(f"Written: {out / experiment.name}.{suffix}", soft_wrap=True)


def _write(
    experiment: Experiment,
    plan: Plan,
    findings: dict[str, Finding],
    lines: list[Line],
    out: Path,
) -> None:
    other = findings.get(experiment.beside)
    record = _about(experiment, plan) | {
        "points": {name: f.as_json(plan.spans, other, plan.window) for name, f in findings.items()},
        "targets": [line.as_json() for line in lines],
    }
    text = json.dumps(as_json(record), indent=1, allow_nan=False) + "\n"
    write_whole(
        {
            out / f"{experiment.name}.json": lambda path: path.write_text(text, "utf-8"),
            out / f"{experiment.name}.png": lambda path: _draw(experiment, plan, findings, path),
        }
    )


def _draw(experiment: Experiment, plan: Plan, findings: dict[str, Finding], path: Path) -> None:
    figure = Figure(figsize=experiment.size, layout="constrained", dpi=130)
    figure.suptitle(experiment.question, fontsize=15, fontweight="bold")
    experiment.draw(plan, findings, figure)
    subject = plan.subject
    figure.supxlabel(
        f"{subject.name}, {subject.source.name}, {plan.rows} conversations of {plan.frames:,} "
        f"frames, seed {subject.seed}; intervals: 95%, bootstrap over conversations",
        fontsize=9,
        color="0.35",
    )
    figure.savefig(path, format="png")


def _about(experiment: Experiment, plan: Plan) -> dict[str, Any]:
    subject = plan.subject
    return {
        "experiment": experiment.name,
        "about": experiment.about,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **circumstances(subject.lm.device),
        "model": {"name": subject.name, "base": base_hash(subject.lm), "context": subject.context},
        "source": subject.source.name,
        "seed": subject.seed,
        "rows": plan.rows,
        "frames": plan.frames,
        "settings": dict(subject.settings),
        "recipes": {"default": asdict(DEFAULT), "hybrid": asdict(HYBRID), "sweep": asdict(SWEEP)},
    }
