"""The figures of serve_soak, and what they must be."""

from __future__ import annotations

from typing import Any

import numpy as np
from soak_clients import Crowd
from voices import DELAY

from ttt_cache.evaluation.lines import Line

GROWTH_MB = 2.0  # what glibc keeps now and gives back then: docs/results.md, eight hours
HOUR = 45_000  # frames
Look = dict[str, float]


def lines_of(crowd: Crowd, log: dict[str, Any]) -> list[Line]:
    """All of them; `log`: `looks`, at least one, `metrics`, `seconds` and `status`."""
    frames = sum(talk.sent for talk in crowd.talks)
    stepped, seconds, steps = (
        float(log["metrics"][f"ttt_cache_{name}"])
        for name in ("frames_total", "step_seconds_sum", "step_seconds_count")
    )
    looks = log["looks"][len(log["looks"]) // 10 :]  # those before are warm-up
    files = [look["files"] for look in looks]
    return [
        Line("frames of each conversation", crowd.frames, at_least=90_000),
        Line("frames sent, all", frames),
        Line("frames that the server stepped, less those", int(stepped) - frames, "", 0, 0),
        *_answers(crowd),
        *_memory("server", looks, len(crowd.talks)),
        *_memory("workers", looks, len(crowd.talks)),
        Line("file descriptors, most", int(max(files))),
        Line("file descriptors, last less first", int(files[-1] - files[0]), at_most=0),
        Line("step of all rows, mean", seconds / steps * 1e3, "ms"),
        Line("rows that shared a step, mean", frames / steps),
        Line("wall clock", log["seconds"] / 60, "minutes"),
        Line("exit status of the server", log["status"], at_most=0, at_least=0),
    ]


def _answers(crowd: Crowd) -> list[Line]:
    """What came back: all of it, and to the right one."""
    talks, twins = crowd.talks, crowd.twins
    lost = sum(abs(talk.sent - DELAY - talk.answered) for talk in talks)
    ended = sum(talk.ended is not None for talk in talks)
    alone, voices = sum(len(t.unmatched) for t in twins), len({talk.digest for talk in talks})
    return [
        Line("answers too few or too many, all", lost, at_most=0),
        Line("samples that are no whole frame", sum(talk.remainder for talk in talks), at_most=0),
        Line("connections closed by the server", ended, at_most=0),
        Line("messages held against the twin's", sum(t.compared for t in twins)),
        Line("of which differ", sum(t.differ for t in twins), at_most=0),
        Line("messages that the twin did not get", alone, at_most=0),
        Line("messages of text", sum(talk.texts for talk in talks), above=0),
        Line("voices that were answered differently", voices, "", len(twins), len(twins)),
    ]


def _memory(name: str, looks: list[Look], clients: int) -> list[Line]:
    """Of the server or its workers, over the hours of each conversation."""
    hours = np.array([look["answered"] for look in looks]) / clients / HOUR
    megabytes = np.array([look[f"{name}_mb"] for look in looks])
    tenth = len(looks) // 9 or 1
    first, last = float(megabytes[:tenth].mean()), float(megabytes[-tenth:].mean())
    slope = float(np.polyfit(hours, megabytes, 1)[0]) if len(looks) > 1 else None
    return [
        Line(f"{name}: memory after a tenth", first, "MB"),
        Line(f"{name}: memory in the last tenth", last, "MB"),
        Line(f"{name}: growth from tenth to last", last - first, "MB", GROWTH_MB),
        Line(f"{name}: slope per hour of conversations", slope, "MB"),
    ]


def markdown(lines: list[Line]) -> str:
    """The table for the docs."""
    rows = [(x.name, f"{x.figure} {x.unit}".strip(), x.target, x.verdict) for x in lines]
    head = [("figure", "value", "target", "verdict"), ("---", "---:", "---", "---")]
    return "".join(f"| {' | '.join(row)} |\n" for row in [*head, *rows])
