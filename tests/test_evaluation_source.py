"""Conversations to measure on: always the same, in pieces, and none of them learned from."""

import random

import pytest
import torch
from data_support import FACTS, tiny_mimi, tiny_tokenizer, write_data_set

from ttt_cache.evaluation.source import MARKS, SEGMENT, RecordedSource, TestbedSource
from ttt_cache.testbed import vocabulary as v
from ttt_cache.testbed.stream import LEVELS, NONE, Conversation, Level
from ttt_cache.training.data import TokenCache


def joined(pieces):
    pieces = list(pieces)
    marks = {n: torch.cat([p.marks[n] for p in pieces], 1) for n in pieces[0].marks}
    return torch.cat([piece.codes for piece in pieces], dim=2), marks


def test_pieces_are_the_conversations_whatever_else_is_asked_for():
    source = TestbedSource("rewritten")
    pieces = list(source.pieces(3, 600, seed=4))
    assert [piece.codes.shape for piece in pieces] == [(3, 5, n) for n in (256, 256, 88)]
    codes, marks = joined(pieces)
    for row in range(3):
        rng = random.Random(f"testbed rewritten, seed 4, row {row}")
        rng.choice([0])
        frames = Conversation(LEVELS["rewritten"], rng).take(600)
        assert codes[row].T.tolist() == [list(frame.codes) for frame in frames]
        for name in MARKS:
            assert marks[name][row].tolist() == [getattr(frame, name) for frame in frames]
    fewer, _ = joined(source.pieces(1, 300, seed=4))
    assert torch.equal(fewer, codes[:1, :, :300])
    assert not torch.equal(joined(source.pieces(1, 300, seed=5))[0], fewer)


def test_the_voice_is_asked_for_where_moshi_begins_to_speak_again():
    codes, marks = joined(TestbedSource("distant").pieces(4, 3 * SEGMENT, seed=0))
    found = 0
    for row in range(4):
        spoken, last = [], 0
        for t in range(codes.shape[2]):
            said, voice = codes[row, v.MOSHI, t], int(codes[row, v.MOSHI_VOICE, t])
            mark = int(marks["voice"][row, t])
            if mark == NONE:
                begins = said != v.SILENCE and codes[row, v.USER, t - 1] == v.TURN
                assert not (spoken and begins)
            else:
                found += 1
                assert spoken and said != v.SILENCE and marks["answer"][row, t] == NONE
                assert mark == max(range(v.VOICES), key=spoken.count)
                assert marks["age"][row, t] == t - last
            if said != v.SILENCE:
                spoken.append(voice // v.SHADES)
                last = t
    assert found > 40


def test_batches_are_as_drawn_and_no_pieces():
    source = TestbedSource("few", "many")
    batches = list(source.batches(3, 40, 2, seed=1))
    assert [batch.shape for batch in batches] == [(3, 5, 40)] * 2
    assert all(map(torch.equal, batches, source.batches(3, 40, 2, seed=1)))
    heard = joined(source.pieces(3, 40, seed=1))[0]
    assert not any(torch.equal(row, other) for b in batches for row in b for other in heard)


def test_several_levels_are_mixed_and_named():
    source = TestbedSource("few", Level(keys=9, overwrite=False))
    assert source.name.startswith("testbed few+Level(keys=9, overwrite=False,")
    _, marks = joined(source.pieces(8, 1000, seed=0))
    most = set(marks["load"].amax(1).tolist())
    assert most == {4, 9}


@pytest.mark.parametrize(
    ("levels", "said"), [((), "at least one of few, many"), (("easy",), "got 'easy'")]
)
def test_unknown_levels_are_refused(levels, said):
    with pytest.raises(ValueError, match=said):
        TestbedSource(*levels)


@pytest.mark.parametrize("wrong", [{"rows": 0}, {"frames": 0}])
def test_nothing_to_draw_is_refused_at_once(wrong):
    with pytest.raises(ValueError, match="must be at least 1"):
        TestbedSource("few").pieces(**({"rows": 1, "frames": 1, "seed": 0} | wrong))


SAMPLES = [60 * 1920, 20 * 1920, 30 * 1920, 45 * 1920, 31 * 1920, 10 * 1920]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recordings")
    manifest = write_data_set(folder / "data", SAMPLES)
    where = folder / "codes"
    made = RecordedSource.prepare(manifest, where, tiny_mimi(), tiny_tokenizer(), FACTS)
    cache = TokenCache.open(where)
    return made, [codes.long() for codes in cache.codes(range(len(SAMPLES)))]


def test_recordings_are_joined_where_they_are_too_short(recorded):
    """Measured on are recordings 0, 2 and 4, of 60, 30 and 31 frames."""
    source, codes = recorded
    expected = [codes[0][:, :50], torch.cat([codes[2], codes[4]], dim=1)[:, :50]]
    heard, marks = joined(source.pieces(2, 50, seed=0))
    assert marks == {}
    assert {tuple(row.flatten().tolist()) for row in heard} == {
        tuple(row.flatten().tolist()) for row in expected
    }
    assert torch.equal(heard, joined(source.pieces(2, 50, seed=0))[0])


def test_recordings_to_learn_from_are_others(recorded):
    """Those are 1, 3 and 5, of 20, 45 and 10 frames: here the first two and the last together."""
    source, codes = recorded
    whole = torch.cat([codes[1], codes[3], codes[5]], dim=1)
    places = set()
    for batch in source.batches(4, 50, 3, seed=0):
        assert batch.shape == (4, FACTS.codebooks, 50) and batch.dtype == torch.int64
        for row in batch:
            places.add(next(i for i in range(26) if torch.equal(row, whole[:, i : i + 50])))
    assert len(places) > 3


def test_too_much_is_refused(recorded):
    source, _ = recorded
    with pytest.raises(ValueError, match=r"3 conversations of 50 frames.*gives 2"):
        source.pieces(3, 50, seed=0)
    with pytest.raises(ValueError, match="fewer than 76 frames"):
        source.batches(1, 76, 1, seed=0)
    assert source.longest == 75
    assert joined(source.pieces(1, 121, seed=0))[0].shape[2] == 121
