"""The curves of a training run, as its metrics file has them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .metrics import read_metrics

SMOOTH = 60  # groups of neighbours; a curve of twice as many points is drawn as their mean


class Curve(NamedTuple):
    """Values over steps, NaN where one was not finite."""

    steps: np.ndarray
    values: np.ndarray


class Run(NamedTuple):
    """What a metrics file says.

    Attributes:
        curves: by name of the figure.
        stages: the step before the first of each stage, and its name.
        last: the last step; 1 if there is none.
    """

    curves: dict[str, Curve]
    stages: list[tuple[int, str]]
    last: int

    def layers(self, name: str) -> dict[int, Curve]:
        """The curves of `name/<layer>`, by layer."""
        parts = {key: key.partition("/") for key in self.curves}
        found = {int(of[2]): key for key, of in parts.items() if of[0] == name}
        return {layer: self.curves[found[layer]] for layer in sorted(found)}

    def depths(self, names: Iterable[str]) -> list[int]:
        """Every layer that has a curve of one of these names, from the bottom."""
        return sorted({layer for name in names for layer in self.layers(name)})


def read_run(path: Path) -> Run:
    """The curves of a metrics file; errors as in `read_metrics`."""
    points: dict[str, list[tuple[int, float]]] = {}
    stages: list[tuple[int, str]] = []
    last = 0
    for record in read_metrics(path):
        step, stage = record.pop("step"), record.pop("stage")
        if not stages or stages[-1][1] != stage:
            stages.append((last, stage))
        last = max(last, step)
        for name, value in record.items():
            points.setdefault(name, []).append((step, np.nan if value is None else value))
    curves = {name: Curve(*np.array(of, dtype=float).T) for name, of in points.items()}
    return Run(curves, stages, max(last, 1))


def smoothed(curve: Curve) -> Curve:
    """The curve itself if it has few points, else the mean of each group of neighbours."""
    size = len(curve.steps) // SMOOTH
    if size < 2:
        return curve
    groups = np.array_split(np.arange(len(curve.steps)), SMOOTH)
    return Curve(*(np.array([part[group].mean() for group in groups]) for part in curve))
