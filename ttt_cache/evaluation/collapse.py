"""Whether a run has collapsed, beside a run that has not."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

LEAST = {"entropy": 0.5, "distinct": 0.5, "tokens": 0.25}  # of the reference's median
LOOPS = 2.0  # of the reference's longest
SHARE = 0.05  # of a run's windows


def collapse(run: Mapping[str, Any], reference: Mapping[str, Any]) -> float:
    """In what share of its windows a run repeats itself, or is silent, as the reference is not.

    A window is degenerate if, in one of its streams (`said` or `voice`),

    - `entropy` or `distinct` is below half of the reference's median,
    - `tokens` is below a quarter of the reference's median (it has fallen silent), or
    - `loop` is above twice the longest in any window of the reference.

    A run has collapsed if more than 5% of its windows are degenerate. What the reference itself is
    worth shows beside what was recorded: `collapse(reference, reference["recorded"])`.

    Args:
        run, reference: from `freerun` with the same `window`, or what it calls `recorded`; also
            read back from JSON.

    Returns:
        the share of degenerate windows.
    """
    bounds = _bounds(reference)
    degenerate = sum(_degenerate(window, bounds) for window in run["windows"])
    return degenerate / len(run["windows"])


def _bounds(reference: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """By stream, the least that a figure may be, and as `loop` the most."""
    bounds: dict[str, dict[str, float]] = {}
    for name in reference["histograms"]:
        windows = [window[name] for window in reference["windows"]]
        bounds[name] = {
            figure: share * median([window[figure] or 0.0 for window in windows])
            for figure, share in LEAST.items()
        } | {"loop": LOOPS * max(window["loop"] for window in windows)}
    return bounds


def _degenerate(window: Mapping[str, Any], bounds: Mapping[str, Mapping[str, float]]) -> bool:
    return any(
        window[name]["loop"] > allowed["loop"]
        or any((window[name][low] or 0.0) < allowed[low] for low in LEAST)
        for name, allowed in bounds.items()
    )
