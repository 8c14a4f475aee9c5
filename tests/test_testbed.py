"""The testbed's conversations: what they ask is answered by what was told, and marked so."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from ttt_cache.testbed import vocabulary as v
from ttt_cache.testbed.model import CONTEXT
from ttt_cache.testbed.stream import LEARNED, LEVELS, NONE, Conversation, Frame, collate, draw

FRAMES = 2000


def talk(level: str, seed: int = 0, frames: int = FRAMES) -> list[Frame]:
    return Conversation(LEVELS[level], random.Random(seed)).take(frames)


def heard(frame: Frame) -> int:
    return frame.codes[v.USER]


@pytest.mark.parametrize("level", LEVELS)
def test_answers_and_marks_are_those_of_what_was_told(level: str) -> None:
    """Replayed from the user's codes alone."""
    values: dict[int, int] = {}
    last: dict[int, int] = {}
    changes: dict[int, int] = {}
    frames, asked = talk(level, frames=4 * FRAMES if level == "held" else FRAMES), 0
    for number, frame in enumerate(frames):
        before = heard(frames[number - 1]) - v.FIRST_KEY
        if v.FIRST_VALUE <= heard(frame) < v.FIRST_WORD:  # `key value`
            changes[before] = changes.get(before, -1) + 1
            values[before], last[before] = heard(frame) - v.FIRST_VALUE, number
        if frame.answer == NONE:
            continue
        asked += 1
        assert heard(frames[number - 2]) == v.ASK  # `? key`, then the answer
        assert frame.answer == v.FIRST_VALUE_TEXT + values[before]
        assert frame.codes[:2] == (frame.answer, v.FIRST_VALUE + values[before])
        assert frame.age == number - last[before]
        assert frame.load == len(values)
        assert frame.rewritten == (changes[before] if LEVELS[level].overwrite else 0)
        last[before] = number
    assert asked > 50


@pytest.mark.parametrize("level", ["few", "many"])
def test_facts_change_only_where_the_level_says_so(level: str) -> None:
    told: dict[int, set[int]] = {}
    frames = talk(level)
    for before, frame in pairwise(frames):
        if v.FIRST_VALUE <= heard(frame) < v.FIRST_WORD:
            told.setdefault(heard(before), set()).add(heard(frame))
    assert len(told) == LEVELS[level].keys
    assert all(len(values) == 1 for values in told.values())


def test_every_side_keeps_its_voice() -> None:
    for seed in range(3):
        frames = talk("rewritten", seed)
        for semantic, acoustic in ((v.MOSHI, v.MOSHI_VOICE), (v.USER, v.USER_VOICE)):
            codes = [
                frame.codes[acoustic] for frame in frames if frame.codes[semantic] != v.SILENCE
            ]
            voices = [code // v.SHADES for code in codes if code < v.QUIET]
            share = max(voices.count(voice) for voice in range(v.VOICES)) / len(voices)
            assert share > 0.8
    assert all((frame.codes[v.MOSHI] == 0) or (heard(frame) == 0) for frame in frames)


def test_codes_are_those_that_the_model_has() -> None:
    batch = draw(3, 500, list(LEVELS.values()), random.Random(0))
    assert batch.codes.shape == (3, 5, 500) and batch.answer.shape == (3, 500)
    assert all(tensor.dtype == torch.int64 for tensor in batch)
    assert batch.codes.min() == 0
    assert batch.codes[:, 0].max() < v.TEXT_CARD and batch.codes[:, 1:].max() < v.CARD


def test_a_conversation_goes_on_where_it_stopped() -> None:
    whole, parts = talk("distant", 3, 300), Conversation(LEVELS["distant"], random.Random(3))
    assert [*parts.take(1), *parts.take(2), *parts.take(297)] == whole
    assert talk("distant", 4, 300) != whole


def test_held_facts_outlast_a_ring() -> None:
    ages = [frame.age for frame in talk("held", frames=20_000) if frame.answer != NONE]
    assert sum(age > CONTEXT for age in ages) > 50
    learned = [frame.age for level in LEARNED for frame in talk(level) if frame.answer != NONE]
    assert sum(age > CONTEXT for age in learned) < len(learned) / 100


def test_dialects_differ_in_their_words_only() -> None:
    assert replace(LEVELS["dialect"], dialect=0) == LEVELS["rewritten"]
    pairs = []
    for level in ("rewritten", "dialect"):
        frames = [heard(frame) for frame in talk(level, frames=20_000)]
        words = [code - v.FIRST_WORD for code in frames]
        pairs.append({p for p in pairwise(words) if min(p) >= 0})
    assert all(len(found) <= 4 * v.WORDS for found in pairs)  # four successors each
    assert len(pairs[0] & pairs[1]) < len(pairs[0]) / 2


def test_rows_become_tensors_in_order() -> None:
    rows = [talk("few", seed, 40) for seed in (0, 1)]
    batch = collate(rows)
    for row, frames in enumerate(rows):
        for number, frame in enumerate(frames):
            assert tuple(batch.codes[row, :, number].tolist()) == frame.codes
            marks = (mark[row, number].item() for mark in batch[1:])
            assert tuple(marks) == frame[1:]
