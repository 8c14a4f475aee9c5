"""Whether a run has collapsed, beside a run that has not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from statistics import median
from typing import Any

LEAST = {"entropy": 0.5, "distinct": 0.5, "tokens": 0.25}  # of the reference's median
LOOPS = 2.0  # of the reference's longest
SHARE = 0.05  # of a run's windows


def collapse(run: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """Whether a run repeats itself, or has fallen silent, where the reference does not.

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
        `collapsed`; `share` of degenerate windows; `since`, the frame from which on all windows of
        some row are degenerate, `None` if its last one is not; `reasons`, how many windows each
        reason makes degenerate.
    """
    bounds = _bounds(reference)
    reasons: Counter[str] = Counter()
    since: dict[int, int | None] = {}
    degenerate = 0
    for window in run["windows"]:
        why = _why(window, bounds)
        reasons.update(why)
        degenerate += bool(why)
        first = since.get(window["row"])
        since[window["row"]] = None if not why else window["start"] if first is None else first
    share = degenerate / len(run["windows"])
    starts = [start for start in since.values() if start is not None]
    return {
        "collapsed": share > SHARE,
        "share": share,
        "since": min(starts, default=None),
        "reasons": dict(reasons),
    }


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


def _why(window: Mapping[str, Any], bounds: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What makes a window degenerate, such as `said.entropy`."""
    why = []
    for name, allowed in bounds.items():
        figures = window[name]
        why += [f"{name}.{low}" for low in LEAST if (figures[low] or 0.0) < allowed[low]]
        why += [f"{name}.loop"] * (figures["loop"] > allowed["loop"])
    return why
