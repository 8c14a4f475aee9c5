"""The benchmark from its plan to its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import torch
from moshi.utils.compile import no_compile
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ttt_cache.demo.talk import threads
from ttt_cache.evaluation.circumstances import circumstances
from ttt_cache.files import write_whole

from .arms import arms_of
from .device import facts
from .measure import Row, measure, turns
from .picture import draw
from .plan import Plan
from .table import table_of, write_csv


@torch.no_grad()
def run(plan: Plan) -> dict[str, Any]:
    """Measure, print the table, and write `bench.json`, `bench.csv` and `bench.png`.

    Returns:
        What is in the JSON file.

    Raises:
        WrongAnswerError: an arm does not compute what it should; nothing is written.
    """
    arms, absent = arms_of(plan)
    rows: list[Row] = []
    # On the CPU compiled parts of Moshi are no faster and round otherwise.
    where = no_compile() if plan.device.type == "cpu" else torch.cuda.device(plan.device)
    with threads(plan.threads), where, _bar(turns(plan) * len(plan.batches)) as bar:
        for batch in plan.batches:
            found, missing = measure(plan, arms, batch, lambda: bar.advance(bar.task_ids[0]))
            rows += found
            absent |= {f"{name}, batch {batch}": why for name, why in missing.items()}
        record = _about(plan)
    result = record | {"absent": absent, "rows": [row.as_json() for row in rows]}
    _write(plan, rows, result)
    _say(plan, rows, absent)
    return result


@contextmanager
def _bar(total: int) -> Iterator[Progress]:
    # Few refreshes: they take time from the steps that are being measured.
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, refresh_per_second=1) as bar:
        bar.add_task("Checking and timing", total=total)
        yield bar


def _about(plan: Plan) -> dict[str, Any]:
    """With what, where and how a result was made."""
    cuda = plan.device.type == "cuda"
    measured = facts(plan.device, plan.dtype) if cuda else None
    return {
        "benchmark": "attention core",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **circumstances(plan.device),
        "gpu": measured,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "threads": plan.threads,
        "seed": plan.seed,
        "clock": _clock(plan),
        "settings": {
            "contexts": plan.contexts,
            "recent": plan.recent,
            "virtual": plan.virtual,
            "chunk": plan.chunk,
            "repetitions": plan.repetitions,
            "dim": plan.widths.dim,
            "heads": plan.widths.heads,
        },
    }


def _clock(plan: Plan) -> str:
    if plan.device.type == "cuda":
        return "CUDA graph and events, cold L2 cache"
    return "processor time of the thread" if plan.threads == 1 else "wall"


def _write(plan: Plan, rows: list[Row], result: dict[str, Any]) -> None:
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    subtitle = (
        f"dim {plan.widths.dim}, {plan.widths.heads} heads, {result['dtype']}, "
        f"{result['device']}, {plan.threads} CPU thread(s), seed {plan.seed}; medians of "
        f"{plan.repetitions} chunks of {plan.chunk} steps"
    )
    write_whole(
        {
            plan.out / "bench.json": lambda path: path.write_text(text, encoding="utf-8"),
            plan.out / "bench.csv": lambda path: write_csv(rows, result, path),
            plan.out / "bench.png": lambda path: draw(rows, subtitle, path),
        }
    )


def _say(plan: Plan, rows: list[Row], absent: dict[str, str]) -> None:
    console = Console()
    console.print(table_of(rows))
    for name, about in {row.arm: row.about for row in rows}.items():
        console.print(f"{name}: {about}", highlight=False)
    for name, why in absent.items():
        console.print(f"{name} is not here: {why}", highlight=False)
    console.print(
        "A core is everything between a layer's projections; MB are of one layer and one "
        "conversation, 10^6 bytes. Rings are full, memories have published several versions."
    )
    for name in ("bench.json", "bench.csv", "bench.png"):
        console.print(f"Written: {plan.out / name}", soft_wrap=True)
