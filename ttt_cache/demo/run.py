"""The demo from its plan to its files."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ttt_cache import testbed
from ttt_cache.evaluation.circumstances import circumstances
from ttt_cache.files import write_whole
from ttt_cache.testbed.text import SPACE
from ttt_cache.testbed.vocabulary import PADDING

from .arms import Arms, make_arms
from .figures import as_json
from .picture import draw
from .plan import Plan
from .story import HELD, write_story
from .table import conversation, recall
from .talk import hold, threads

ROWS = 8  # conversations at once


def run(plan: Plan) -> dict[str, Any]:
    """Hold the conversations, print the tables, write `demo.png` and `demo.json`.

    Returns:
        What is in the JSON file.
    """
    progress = Console(stderr=True)
    start = time.perf_counter()
    with threads(plan.threads):
        with progress.status("Loading the models"):
            arms = make_arms(plan.frames, plan.device)
            story = write_story(ROWS, plan.frames, plan.seed)
        with _bar(progress) as bar:
            task = bar.add_task("Talking", total=plan.frames)
            talks = hold(arms.each, story.heard, lambda done: bar.update(task, completed=done))
        where = circumstances(torch.device(plan.device))
    result = _about(plan, arms) | where | as_json(arms, story, talks, _speller())
    result["wall_seconds"] = round(time.perf_counter() - start, 1)
    _write(plan, result)
    _say(plan, result)
    return result


def _bar(console: Console) -> Progress:
    # Few refreshes: they take time from the steps that are being measured.
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    left = TextColumn("frames,"), TimeRemainingColumn(), TextColumn("left")
    return Progress(*columns, *left, console=console, refresh_per_second=2)


def _speller() -> Callable[[int], str]:
    """What turns a text token into a word."""
    pieces = testbed.tokenizer()

    def word(token: int) -> str:
        return "silence" if token == PADDING else pieces.id_to_piece(token).removeprefix(SPACE)

    return word


def _about(plan: Plan, arms: Arms) -> dict[str, Any]:
    return {
        "note": "Moshi's most likely words; it hears the user's side only, and itself",
        "seed": plan.seed,
        "settings": arms.config.to_json(),
    }


def _write(plan: Plan, result: dict[str, Any]) -> None:
    subtitle = (
        f"The testbed's Moshi (trained here, not Kyutai's), float32, {result['device']}, "
        f"{plan.threads} CPU thread(s), seed {plan.seed}"
    )
    text = json.dumps(result, indent=2) + "\n"
    write_whole(
        {
            plan.out / "demo.png": lambda path: draw(result, subtitle, path),
            plan.out / "demo.json": lambda path: path.write_text(text, encoding="utf-8"),
        }
    )


def _say(plan: Plan, result: dict[str, Any]) -> None:
    console = Console()
    console.print(conversation(result))
    console.print(recall(result))
    for name, arm in result["arms"].items():
        console.print(f"{name}: {arm['keeps']}", highlight=False)
    console.print(
        f"A small Moshi, trained on generated conversations, hears the user's side of "
        f"{result['conversations']} of them, frame by frame through LMGen, and says what it finds "
        f"most likely; a step is a frame of all of them, state is that of one. Each begins with "
        f"{HELD} facts that are asked for once; the talk between has others, which change."
    )
    if plan.frames <= result["context"]:
        console.print(
            f"Note: {plan.frames} frames are within the context of {result['context']}; stock "
            f"Moshi has forgotten nothing yet."
        )
    for name in ("demo.png", "demo.json"):
        console.print(f"Written: {plan.out / name}", soft_wrap=True)
