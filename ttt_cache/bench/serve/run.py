"""The load generator from its plan to its files."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ttt_cache.evaluation.circumstances import versions
from ttt_cache.files import write_whole

from .figures import BEHIND_MS, FRAME_MS, Level
from .level import measure, seconds
from .picture import draw
from .plan import Plan
from .ramp import UNKNOWN, levels, most_held, verdict
from .server import look
from .table import ordered, table_of, write_csv

FILES = "serve.json", "serve.csv", "serve.png"


def run(plan: Plan, delay: int) -> dict[str, Any]:
    """Measure level after level, print a table, write `serve.json`, `serve.csv`, `serve.png`.

    Ctrl-C ends it early: what was measured is written, and `interrupted` says so.

    Args:
        delay: of the server's model, in frames, as `probe` finds it.

    Returns:
        What is in the JSON file.

    Raises:
        KeyboardInterrupt: before the first level has ended; nothing is written.
    """
    done: list[Level] = []
    record, interrupted = _about(plan, delay), False
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), refresh_per_second=2, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("")
        try:
            for number in levels(plan.clients, done):
                done.append(_one(plan, number, delay, bar, task))
        except KeyboardInterrupt:
            if not done:
                raise
            interrupted = True
    found = {level.clients: level.held for level in done}
    answer = verdict(found)
    held = None if answer == UNKNOWN else most_held(found)
    figures = [level.as_json() for level in ordered(done)]
    result = record | {"interrupted": interrupted, "held": held, "levels": figures}
    _write(plan, done, result, answer)
    _say(plan, done, answer)
    return result


def _one(plan: Plan, number: int, delay: int, bar: Progress, task: TaskID) -> Level:
    name = "1 conversation" if number == 1 else f"{number} conversations"
    bar.reset(task, description=name, total=seconds(plan))
    return measure(plan, number, delay, lambda passed: bar.update(task, completed=passed))


def _about(plan: Plan, delay: int) -> dict[str, Any]:
    """With what and where a result was made; the machine is the generator's own."""
    server = look(plan)
    told = None if server is None else {"rows": server.rows, "state_bytes": server.state_bytes}
    return {
        "benchmark": "serve",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": plan.command,
        "versions": versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "settings": plan.settings,
        "delay_frames": delay,
        "server": told,
    }


def _write(plan: Plan, done: Sequence[Level], result: dict[str, Any], answer: str) -> None:
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    subtitle = (
        f"{plan.url}, {plan.codec}, {plan.seconds:g} s for each level, seed {plan.seed}, "
        f"ttt-cache {result['versions']['ttt_cache']}, {result['date']}"
    )
    path = dict(zip(FILES, (plan.out / name for name in FILES), strict=True))
    write_whole(
        {
            path["serve.json"]: lambda at: at.write_text(text, encoding="utf-8"),
            path["serve.csv"]: lambda at: write_csv(done, result, at),
            path["serve.png"]: lambda at: draw(done, answer, result["held"], subtitle, at),
        }
    )


def _say(plan: Plan, done: Sequence[Level], answer: str) -> None:
    console = Console()
    console.print(table_of(done))
    for level in ordered(done):
        for reason in level.reasons:
            console.print(f"With {level.clients}: {reason}", highlight=False)
        if not level.on_schedule:
            behind = math.ceil(10 * (level.behind_p99_ms or 0.0)) / 10  # never "20 of 20 allowed"
            console.print(
                f"With {level.clients}: the generator itself was {behind:.1f} ms "
                f"late to send (p99; {BEHIND_MS:g} allowed). This says nothing of the server: give "
                "the generator more cores, or another machine than the server's.",
                highlight=False,
            )
    console.print(
        f"Held in real time: {answer} (p99 within {FRAME_MS:g} ms, none lost, none refused)"
    )
    for name in FILES:
        console.print(f"Written: {plan.out / name}", soft_wrap=True)
