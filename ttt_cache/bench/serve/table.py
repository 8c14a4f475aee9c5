"""The levels as a table, and as rows of a CSV file."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from .figures import Level


def table_of(levels: Sequence[Level]) -> Table:
    """A line for each level, by the number of conversations."""
    table = Table(title="Milliseconds from when a frame was due until its answer was there")
    columns = ("clients", "p50", "p95", "p99", "max", "late", "lost", "refused", "broken")
    for column in (*columns, "step p50, p99", "real time"):
        table.add_column(column, justify="right")
    for level in ordered(levels):
        times = (level.p50_ms, level.p95_ms, level.p99_ms, level.max_ms)
        late = "-" if level.late_share is None else f"{level.late_share:.2%}"
        counts = (str(n) if n else "" for n in (level.lost, level.refused, level.broken))
        steps = f"{_ms(level.step_p50_ms)}, {_ms(level.step_p99_ms)}"
        verdict = ("yes" if level.held else "no") if level.on_schedule else "unknown"
        table.add_row(str(level.clients), *map(_ms, times), late, *counts, steps, verdict)
    return table


def ordered(levels: Sequence[Level]) -> list[Level]:
    return sorted(levels, key=lambda level: level.clients)


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return "never" if math.isinf(value) else f"{value:,.1f}"


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
            writer.writerow(line | {"reasons": "; ".join(line["reasons"])} | shared)
