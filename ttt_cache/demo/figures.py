"""The figures of the demo: one place from which tables, picture and JSON are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from .arms import Arm, Arms
from .story import Question, Story
from .talk import Talk

FRAME_SECONDS = 0.08
WARM_UP = 20  # steps whose times are left out, on runs that are long enough
SPAN = 500  # steps at each end of a run over which times are summed up


def as_json(
    arms: Arms, story: Story, talks: Sequence[Talk], word: Callable[[int], str]
) -> dict[str, Any]:
    """What was asked and answered, and what it cost, as plain JSON values.

    Args:
        talks: one for each arm.
        word: what a text token says.
    """
    rows, _, frames = story.heard.shape
    edges = edges_of(arms, frames)
    return {
        "frames": frames,
        "minutes": frames * FRAME_SECONDS / 60,
        "conversations": rows,
        "window": arms.window,
        "context": arms.context,
        "ages": [_asked(story.questions, *edge) for edge in pairwise(edges)],
        "arms": {
            arm.name: _figures(arm, talk, story.questions, edges)
            for arm, talk in zip(arms.each, talks, strict=True)
        },
        "first_conversation": [
            _in_words(question, arms.each, talks, word)
            for question in story.questions
            if question.held and question.row == 0
        ],
    }


def edges_of(arms: Arms, frames: int) -> list[int]:
    """Ages, in frames, at which questions are told apart: the first ones are within the window,
    those from the context on beyond Moshi's ring."""
    beyond, context = arms.window + 1, arms.context
    edges = [0, beyond, context // 4, context, (context + frames) // 2]
    return [edge for edge in edges if edge < frames] + [frames]


def _asked(questions: Sequence[Question], first: int, end: int) -> dict[str, int]:
    inside = [question for question in questions if first <= question.age < end]
    return {"from": first, "to": end, "questions": len(inside)}


def _figures(
    arm: Arm, talk: Talk, questions: Sequence[Question], edges: list[int]
) -> dict[str, Any]:
    right = [question.age for question in questions if _said(talk, question) == question.answer]
    sizes, times = talk.state_bytes, talk.seconds * 1000
    first, last = spans(len(times))
    return {
        "keeps": arm.about,
        "right": [sum(start <= age < end for age in right) for start, end in pairwise(edges)],
        "state_bytes_start": sizes[0],
        "state_bytes_end": sizes[-1],
        "step_ms_first": float(np.median(times[first])),
        "step_ms_last": float(np.median(times[last])),
        "step_ms_p99": float(np.percentile(times[first.start :], 99)),
    }


def _said(talk: Talk, question: Question) -> int:
    return int(talk.said[question.row, question.frame])


def spans(steps: int) -> tuple[slice, slice]:
    """The steps at both ends whose times are summed up: 500, at most a fifth."""
    warm_up = min(WARM_UP, steps // 5)
    length = max(1, min(SPAN, steps // 5))
    return slice(warm_up, warm_up + length), slice(steps - length, steps)


def _in_words(
    question: Question, arms: Sequence[Arm], talks: Sequence[Talk], word: Callable[[int], str]
) -> dict[str, Any]:
    return {
        "fact": question.fact,
        "told_at_frame": question.frame - question.age,
        "asked_at_frame": question.frame,
        "right": word(question.answer),
        "said": {
            arm.name: word(_said(talk, question)) for arm, talk in zip(arms, talks, strict=True)
        },
    }
