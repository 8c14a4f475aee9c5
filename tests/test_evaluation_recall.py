"""Recall, counted by hand."""

import json

import pytest
import torch

from ttt_cache.evaluation.forced import Scores
from ttt_cache.evaluation.recall import FAR, NEAR, Recall, apart_by, relative
from ttt_cache.testbed import vocabulary as v
from ttt_cache.testbed.stream import NONE

RECENT, CHUNK = 10, 4
FRAMES = 40

# Of one conversation: frame, age, load, rewritten, whether it was right.
ASKED = [
    (3, 2, 1, 0, True),
    (5, 10, 1, 0, False),  # just near
    (7, 11, 2, 0, True),  # neither near nor far
    (9, 13, 2, 0, True),  # nor this
    (12, 14, 2, 0, True),  # just far
    (20, 19, 3, 1, False),
    (33, 32, 3, 5, True),
]
# Frame in which Moshi begins to speak again, frames since it last did, the voice that it chose.
SPOKEN = [(15, 9, 2), (17, 14, 2), (25, 30, 3)]
TRUE_VOICE = 2


def conversation(flip=()):
    """Scores and marks of one row; `flip` turns answers by their place in `ASKED`."""
    marks = {n: torch.zeros(1, FRAMES, dtype=torch.int64) for n in ("age", "load", "rewritten")}
    marks |= {n: torch.full((1, FRAMES), NONE) for n in ("answer", "voice")}
    choices = torch.zeros(1, 3, FRAMES, dtype=torch.int64)
    for place, (frame, age, load, rewritten, right) in enumerate(ASKED):
        marks["answer"][0, frame] = 7
        for name, value in (("age", age), ("load", load), ("rewritten", rewritten)):
            marks[name][0, frame] = value
        choices[0, 0, frame] = 7 if right != (place in flip) else 8
    for frame, age, voice in SPOKEN:
        marks["age"][0, frame], marks["voice"][0, frame] = age, TRUE_VOICE
        choices[0, 2, frame] = voice * v.SHADES + 5
    return choices, marks


def add(recall, *talks):
    """Rows of talks, in two pieces."""
    choices = torch.cat([talk[0] for talk in talks])
    marks = {name: torch.cat([talk[1][name] for talk in talks]) for name in talks[0][1]}
    for part in (slice(0, 16), slice(16, FRAMES)):
        nats = torch.zeros(len(talks), FRAMES)[:, part]
        scores = Scores(part.start, nats, nats, nats, choices[:, :, part])
        recall.add(scores, {name: mark[:, part] for name, mark in marks.items()})
    return recall


def shares(bins):
    return {(b["begin"], b["end"]): (b["share"][0], b["asked"]) for b in bins}


def test_everything_by_hand():
    result = add(Recall(RECENT, CHUNK), conversation()).result()
    json.dumps(result, allow_nan=False)
    assert result["near"] == {"share": [0.5, None, None], "asked": 2}
    assert result["far"] == {"share": [2 / 3, None, None], "asked": 3}
    assert result["voice_near"] == {"share": [1, None, None], "asked": 1}
    assert result["voice_far"] == {"share": [0.5, None, None], "asked": 2}
    assert shares(result["by_age"]) == {
        (2, 4): (1, 1),
        (8, 16): (0.75, 4),
        (16, 32): (0, 1),
        (32, 64): (1, 1),
    }
    assert shares(result["by_load"]) == {(2, 3): (1, 1), (3, 4): (0.5, 2)}
    assert shares(result["by_rewritten"]) == {(0, 1): (1, 1), (1, 2): (0, 1), (4, 8): (1, 1)}
    assert shares(result["by_position"]) == {(8, 16): (1, 1), (16, 32): (0, 1), (32, 64): (1, 1)}


def test_the_delayed_voice_at_the_end_is_not_asked_for():
    choices, marks = conversation()
    choices[:, 2, 25] = -1
    assert add(Recall(RECENT, CHUNK), (choices, marks)).result()["voice_far"]["asked"] == 1


def test_shares_are_of_questions_not_of_files():
    """One far answer of three is wrong in the first, two in the second."""
    recall = add(Recall(RECENT, CHUNK), conversation(), conversation(flip=[4]))
    assert recall.files == 2
    assert recall.share().value == pytest.approx(3 / 6)
    assert (recall.share().low, recall.share().high) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert recall.share("facts", NEAR).value == 0.5
    assert recall.share("voice", FAR).value == 0.5


def test_relative_recall_is_paired():
    full = add(Recall(RECENT, CHUNK), conversation(flip=[5]), conversation(flip=[5]))
    arm = add(Recall(RECENT, CHUNK), conversation(), conversation())
    assert [float(x) for x in relative(arm, full)] == pytest.approx([2 / 3] * 3)
    less = float(arm.share().value - full.share().value)
    assert less < 0
    assert [float(x) for x in apart_by(arm, full)] == pytest.approx([less] * 3)
    kept = Recall.from_json(json.loads(json.dumps(arm.as_json())))
    assert kept.result() == arm.result()
    assert relative(kept, full).value == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="chunk 4 and 5"):
        relative(arm, add(Recall(RECENT, CHUNK + 1), conversation(), conversation()))
    with pytest.raises(ValueError, match="2 and 1 files"):
        relative(arm, add(Recall(RECENT, CHUNK), conversation()))


def test_data_without_marks_is_refused():
    choices, marks = conversation()
    del marks["voice"], marks["age"]
    with pytest.raises(ValueError, match="marks must tell age, voice"):
        add(Recall(RECENT, CHUNK), (choices, marks))
