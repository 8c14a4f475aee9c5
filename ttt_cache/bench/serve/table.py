"""The levels as a table, and as rows of a CSV file."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from .figures import Level
from .ramp import UNKNOWN

HELD = {True: "yes", False: "no", None: UNKNOWN}


def table_of(levels: Sequence[Level]) -> Table:
    """A line for each level, by the number of conversations; within 80 characters."""
    title = "Milliseconds from when a frame was due until its answer was there"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0)
    columns = ("clients", "p50", "p95", "p99", "max", "late", "lost", "refused", "broken")
    for column in (*columns, "step\np99", "real\ntime"):
        table.add_column(column, justify="right", overflow="fold")  # never cut a figure off
    for level in ordered(levels):
        times = (level.p50_ms, level.p95_ms, level.p99_ms, level.max_ms)
        late = "-" if level.late_share is None else f"{level.late_share:.2%}"
        counts = (str(n) if n else "" for n in (level.lost, level.refused, level.broken))
        step, held = _ms(level.step_p99_ms), HELD[level.held]
        table.add_row(str(level.clients), *map(_ms, times), late, *counts, step, held)
    return table


def ordered(levels: Sequence[Level]) -> list[Level]:
    return sorted(levels, key=lambda level: level.clients)


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    if math.isinf(value):
        return "never"
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def write_csv(levels: Sequence[Level], record: Mapping[str, Any], path: Path) -> None:
    """One line for each level, with what it was measured with in each."""
    shared = {name: record[name] for name in ("date", "machine", "delay_frames")}
    shared |= {name: record["settings"][name] for name in ("url", "seconds", "codec", "seed")}
    shared |= record["versions"]
    lines = [level.as_json() for level in ordered(levels)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*Level(1).as_json(), *shared])
        writer.writeheader()
        for line in lines:
            held = UNKNOWN if line["held"] is None else line["held"]
            told = {"held": held, "reasons": "; ".join(line["reasons"])}
            writer.writerow(line | told | shared)
