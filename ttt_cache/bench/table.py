"""The figures of a benchmark as a table, and as rows of a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from .measure import Row


def table_of(rows: Sequence[Row]) -> Table:
    """Arms below each other; for each batch size the time of a step, and beside stock's."""
    table = Table(title="One attention core, milliseconds of a step (share of the first arm's)")
    table.add_column("arm", no_wrap=True)
    table.add_column("MB", justify="right")
    batches = sorted({row.batch for row in rows})
    for batch in batches:
        table.add_column(f"batch {batch}", justify="right")
    for arm in dict.fromkeys(row.arm for row in rows):
        mine = {row.batch: row for row in rows if row.arm == arm}
        size = next(iter(mine.values())).state_bytes / 1e6
        table.add_row(arm, f"{size:,.2f}", *(_cell(mine.get(batch), rows) for batch in batches))
    return table


def _cell(row: Row | None, rows: Sequence[Row]) -> str:
    if row is None:
        return "-"
    first = next(other for other in rows if other.batch == row.batch)
    return f"{row.step_ms:,.3f} ({row.step_ms / first.step_ms:.3f})"


def write_csv(rows: Sequence[Row], record: Mapping[str, Any], path: Path) -> None:
    """One line for each arm and batch size, with device and versions in each."""
    shared = {name: record[name] for name in ("device", "dtype", "threads", "date", "seed")}
    shared |= record["versions"]
    with path.open("w", newline="", encoding="utf-8") as file:
        own = [{k: v for k, v in row.as_json().items() if k != "samples_ms"} for row in rows]
        writer = csv.DictWriter(file, [*own[0], *shared])
        writer.writeheader()
        writer.writerows(line | shared for line in own)
