"""What the demo prints at its end, in 80 columns."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .figures import FRAME_SECONDS


def clock(frames: int) -> str:
    """A number of frames as minutes and seconds."""
    minutes, seconds = divmod(round(frames * FRAME_SECONDS), 60)
    return f"{minutes}:{seconds:02d}"


def span(age: dict[str, int]) -> str:
    """A span of ages as minutes and seconds."""
    return f"{clock(age['from'])}-{clock(age['to'])}"


def where(age: dict[str, int], result: dict[str, Any]) -> str:
    """What has forgotten facts of that age."""
    if age["to"] <= result["window"] + 1:
        return "in the window"
    return "beyond ring" if age["from"] >= result["context"] else ""


def conversation(result: dict[str, Any]) -> Table:
    """What was told at first in one conversation, and what each model said when it was asked."""
    title = "One conversation: told at its beginning, asked for minutes later"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("told")
    table.add_column("asked", justify="right")
    for name in result["arms"]:
        table.add_column(name)
    for question in result["first_conversation"]:
        later, right = question["asked_at_frame"] - question["told_at_frame"], question["right"]
        said = (_marked(word, right) for word in question["said"].values())
        table.add_row(f"the {question['fact']} is {right}", clock(later), *said)
    return table


def _marked(word: str, right: str) -> str:
    return f"[green]{word} ✓[/]" if word == right else f"[red]{word} ✗[/]"


def recall(result: dict[str, Any]) -> Table:
    """Right answers by the age of the fact, and what each model costs."""
    count, arms = result["conversations"], result["arms"]
    title = f"All {count} conversations of {result['minutes']:.3g} minutes: right answers, and cost"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("told so long ago")
    table.add_column("asked", justify="right")
    for name in arms:
        table.add_column(name, justify="right")
    for number, age in enumerate(result["ages"]):
        asked = age["questions"]
        if asked:
            shares = (f"{arm['right'][number] / asked:.1%}" for arm in arms.values())
            table.add_row(f"{span(age)} {where(age, result)}", f"{asked}", *shares)
    table.add_section()
    sizes = (("start", "at the start"), ("end", "at the end"))
    for key, when in sizes:
        figures = (f"{arm[f'state_bytes_{key}'] / 1000:,.1f}" for arm in arms.values())
        table.add_row(f"state {when} (kB)", "", *figures)
    times = (("first", "at the start"), ("last", "at the end"), ("p99", "p99"))
    for key, when in times:
        figures = (f"{arm[f'step_ms_{key}']:.2f}" for arm in arms.values())
        table.add_row(f"step {when} (ms)", "", *figures)
    return table
