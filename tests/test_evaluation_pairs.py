"""Paired likelihoods: each is that of the whole conversation run from scratch."""

import json
import random

import pytest
import torch
from models import SMALL, stir, tiny_lm

import ttt_cache
from ttt_cache.evaluation import continuations
from ttt_cache.evaluation.continuations import (
    FREE,
    OLD,
    OTHER,
    RECORDING,
    VOICE,
    RecordedTeller,
    TestbedTeller,
)
from ttt_cache.evaluation.forced import Forcing
from ttt_cache.evaluation.pairs import Pairs, pairs
from ttt_cache.evaluation.source import SEGMENT, Piece, TestbedSource
from ttt_cache.testbed import vocabulary as v
from ttt_cache.testbed.stream import LEVELS, Conversation, Level

FAR, FARTHER = 10, 40


def testbed_lm(**settings):
    model = tiny_lm(card=v.CARD, text_card=v.TEXT_CARD, delays=v.DELAYS, num_layers=2)
    torch.manual_seed(3)
    ttt_cache.patch(model, **(SMALL | settings))
    stir(model)
    return model


testbed_lm.__test__ = False


class Recorded:
    """The testbed's codes as if they were recordings: without marks."""

    name = "recorded"

    def pieces(self, rows, frames, seed):
        for piece in TestbedSource("few").pieces(rows, frames, seed):
            yield Piece(piece.codes, {})


def from_scratch(lm, before, continuation):
    """Log-likelihood of what follows, one forward pass over everything for each row."""
    whole = torch.cat([before, continuation], dim=2)
    nats = Forcing(lm, len(whole)).feed(whole).nats[:, :, before.shape[2] :]
    return -nats.double().nan_to_num(0).sum((1, 2))


@pytest.mark.parametrize(
    "settings",
    [{"recent": 16, "chunk": 16}, {"memory": "none", "recent": 5000}],
    ids=["ttt", "full"],
)
def test_a_fork_is_each_continuation_from_scratch(monkeypatch, settings):
    seen = {}
    add = Pairs.add

    def keep(self, kind, place, margin):
        seen.setdefault((*place, kind), []).append(margin)
        add(self, kind, place, margin)

    monkeypatch.setattr(Pairs, "add", keep)
    lm, rows, source = testbed_lm(**settings), 2, TestbedSource(Level(keys=3))
    found = pairs(lm, source, [300, 600], rows=rows, fillers=[FAR, FARTHER], seed=5)
    codes = torch.cat([piece.codes for piece in source.pieces(rows, 600, 5)], dim=2)
    teller, expected = TestbedTeller(rows, random.Random("pairs 5")), {}
    for length, place in ((300, SEGMENT), (600, 2 * SEGMENT)):
        teller.hear(codes[:, :, place - SEGMENT : place])
        for filler in (FAR, FARTHER):
            before = torch.cat([codes[:, :, :place], teller.filler(filler)], dim=2)
            for question in teller.questions(codes[:, :, place:]):
                right = from_scratch(lm, before, question.good)
                for kind, (bad, there) in question.bad.items():
                    margin = (right - from_scratch(lm, before, bad)).masked_fill(~there, torch.nan)
                    expected.setdefault((length, filler, kind), []).append(margin)
    assert seen.keys() == expected.keys()
    for key, margins in expected.items():
        for got, margin in zip(seen[key], margins, strict=True):
            assert torch.allclose(got, margin, atol=2e-4, equal_nan=True)
    for line in found.result():
        margins = torch.cat(expected[line["length"], line["filler"], line["kind"]])
        there = margins[~margins.isnan()]
        assert line["pairs"] == len(there)
        if len(there):
            assert line["margin"][0] == pytest.approx(there.mean().item(), abs=1e-4)
            assert line["share"][0] == pytest.approx((there > 0).float().mean().item())
    assert any(line["pairs"] > 5 for line in found.result())
    again = Pairs.from_json(json.loads(json.dumps(found.as_json(), allow_nan=False)))
    assert again.result() == found.result()


def talks(level, rows=3, frames=700):
    """Conversations, and what a teller heard of them."""
    made = [Conversation(LEVELS[level], random.Random(row)) for row in range(rows)]
    codes = torch.stack([torch.tensor([f.codes for f in t.take(frames)]).T for t in made])
    teller = TestbedTeller(rows, random.Random(0))
    for part in codes.split(100, dim=2):
        teller.hear(part)
    return made, codes, teller


def said(codes, row):
    """What a continuation of a question is about: key, and value of text, sound and voice."""
    frames = codes[row].T.tolist()
    assert frames[0][v.USER] == v.ASK and len(frames) == 4
    text, sound, voice, *user = frames[2]
    assert user == [v.SILENCE, v.QUIET] and frames[3] == [3, v.SILENCE, v.QUIET, *user]
    assert text - v.FIRST_VALUE_TEXT == sound - v.FIRST_VALUE
    return frames[1][v.USER] - v.FIRST_KEY, text - v.FIRST_VALUE_TEXT, voice


@pytest.mark.parametrize("level", ["few", "many", "rewritten"])
def test_every_known_fact_is_asked_for_rightly_and_wrongly(level):
    made, codes, teller = talks(level)
    questions = [q for q in teller.questions(codes) if FREE in q.bad]
    for row, talk in enumerate(made):
        told = codes[row, v.USER]
        values = set(
            (told[(told >= v.FIRST_VALUE) & (told < v.FIRST_WORD)] - v.FIRST_VALUE).tolist()
        )
        now = {key: fact.value for key, fact in talk.facts.items()}
        asked = set()
        for question in questions:
            never, other, old = (question.bad[kind] for kind in (FREE, OTHER, OLD))
            if not never[1][row]:
                assert not other[1][row] and not old[1][row]
                continue
            key, value, voice = said(question.good, row)
            asked.add(key)
            assert value == now[key]
            assert said(never[0], row)[0] == key and said(never[0], row)[1] not in values
            assert other[1][row] and said(other[0], row)[1] in set(now.values()) - {value}
            assert bool(old[1][row]) == (key in teller.known[row].before)
            if old[1][row]:
                assert talk.facts[key].rewritten and said(old[0], row)[1] != value
            assert voice == talk.moshi_voice * v.SHADES + v.shade(v.FIRST_VALUE + value)
        assert asked == set(now) - {int(told[-1]) - v.FIRST_KEY}
    if level != "rewritten":
        assert not any(q.bad[OLD][1].any() for q in questions)


def test_where_all_was_told_the_longest_forgotten_value_is_wrong():
    _, codes, teller = talks("rewritten", rows=1, frames=4000)
    known = teller.known[0]
    assert len(known.told) == v.VALUES
    now = set(known.now.values())
    expected = next(value for value in known.told if value not in now)
    wrong = {said(q.bad[FREE][0], 0)[1] for q in teller.questions(codes) if FREE in q.bad}
    assert wrong == {expected}
    told = codes[0, v.USER] - v.FIRST_VALUE
    last = {value: int((told == value).nonzero()[-1]) for value in set(range(v.VALUES)) - now}
    assert expected == min(last, key=last.__getitem__)


def test_moshi_goes_on_in_its_voice_or_in_another():
    made, codes, teller = talks("rewritten")
    questions = [q for q in teller.questions(codes) if VOICE in q.bad]
    assert len(questions) == continuations.TURNS
    for question in questions:
        bad, there = question.bad[VOICE]
        assert there.all()
        same = [v.TEXT, v.MOSHI, v.USER, v.USER_VOICE]
        assert torch.equal(question.good[:, same], bad[:, same])
        for row, talk in enumerate(made):
            right, wrong = (c[row, v.MOSHI_VOICE, 1:3] // v.SHADES for c in (question.good, bad))
            assert (right == talk.moshi_voice).all() and (wrong != talk.moshi_voice).all()


def test_filler_is_that_of_the_conversation():
    """No fact, no question and nothing of Moshi: frames that were heard, in order."""
    _, codes, teller = talks("dialect")
    filler = teller.filler(50)
    assert filler.shape == (3, 5, 50)
    for row in range(3):
        heard = [tuple(frame) for frame in codes[row].T.tolist()]
        frames = [tuple(frame) for frame in filler[row].T.tolist()]
        assert set(frames) <= set(heard)
        idle = [
            f
            for f in heard
            if f[v.MOSHI] == v.SILENCE and (f[v.USER] == v.SILENCE or f[v.USER] >= v.FIRST_WORD)
        ]
        idle = idle[-continuations.REMEMBERED :] * 2  # from the last one it goes on with the first
        assert any(idle[i : i + 50] == frames for i in range(len(idle)))


def test_recordings_go_on_as_they_do_or_as_another():
    codes, teller = torch.randint(0, 9, (4, 5, 100)), RecordedTeller(4)
    teller.hear(codes[:, :, :60])
    teller.hear(codes[:, :, 60:])
    filler, questions = teller.filler(130), list(teller.questions(codes))
    assert len(questions) == 2
    for row in range(4):
        others = {(row - shift) % 4 for shift in (1, 2)}
        assert len(others | {row, (row + 1) % 4}) == 4  # the filler is of none that is compared
        heard = codes[(row + 1) % 4]
        assert torch.equal(filler[row], torch.cat([heard, heard[:, :30]], dim=1))
        for shift, question in enumerate(questions, 1):
            bad, there = question.bad[RECORDING]
            assert there.all() and torch.equal(question.good, codes[:, :, : continuations.LENGTH])
            assert torch.equal(bad[row], codes[row - shift, :, : continuations.LENGTH])


def test_recordings_are_asked_behind_filler_and_once_something_was_heard():
    lm, fillers = testbed_lm(), [FAR, FARTHER]
    found = pairs(lm, Recorded(), [SEGMENT, 2 * SEGMENT], rows=3, fillers=fillers).result()
    places = [(line["length"], line["filler"], line["pairs"], line["kind"]) for line in found]
    # One other of each row, after the first piece, and then after the second, too.
    expected = [(SEGMENT, filler, 3, RECORDING) for filler in fillers]
    assert places == expected + [(2 * SEGMENT, filler, 6, RECORDING) for filler in fillers]
    before, ahead = (piece.codes for piece in Recorded().pieces(3, 2 * SEGMENT, 0))
    for line, filler in zip(found, fillers, strict=False):
        heard = torch.cat([before, before.roll(-1, 0)[:, :, :filler]], dim=2)
        ways = ahead[:, :, : continuations.LENGTH]
        margin = from_scratch(lm, heard, ways) - from_scratch(lm, heard, ways.roll(1, 0))
        assert line["margin"][0] == pytest.approx(margin.mean().item(), abs=1e-3)


def test_two_recordings_are_too_few():
    with pytest.raises(ValueError, match="rows of recordings must be at least 3, got 2"):
        pairs(testbed_lm(), Recorded(), [SEGMENT], rows=2, fillers=[FAR])


def test_codes_that_one_recording_lacks_count_in_neither(monkeypatch):
    seen, lm = [], testbed_lm()
    monkeypatch.setattr(Pairs, "add", lambda self, kind, place, margin: seen.append(margin))
    holes = torch.zeros(3, 5, 2 * SEGMENT, dtype=torch.bool)
    holes[1, v.TEXT, SEGMENT + 5 : SEGMENT + 40] = True
    holes[1, v.MOSHI_VOICE, SEGMENT + 10] = True
    holes[2, :3, SEGMENT:] = True  # Moshi lacks all of it, as it does
    holes[0, :3, FAR - 1] = True  # the end of the filler, of which a code is predicted later
    whole = torch.cat([piece.codes for piece in Recorded().pieces(3, 2 * SEGMENT, 0)], dim=2)
    whole = whole.masked_fill(holes, lm.zero_token_id)

    class Lacking(Recorded):
        def pieces(self, rows, frames, seed):
            yield from (Piece(part, {}) for part in whole.split(SEGMENT, dim=2))

    pairs(lm, Lacking(), [SEGMENT], rows=3, fillers=[FAR])
    before, ahead = whole[:, :, :SEGMENT], whole[:, :, SEGMENT : SEGMENT + continuations.LENGTH]
    before = torch.cat([before, before.roll(-1, 0)[:, :, :FAR]], dim=2)
    (margin,) = seen  # one other of each row
    nats = []
    for part in (ahead, ahead.roll(1, 0)):
        heard = torch.cat([before, part], dim=2)
        nats.append(Forcing(lm, 3).feed(heard).nats[:, :, SEGMENT + FAR :].double())
    right, wrong = nats
    assert not torch.equal(right.isnan(), wrong.isnan())
    each = wrong - right  # NaN where either is
    assert torch.allclose(margin[:2], each[:2].nansum((1, 2)), atol=2e-4)
    assert each[2].isnan().all() and margin[2].isnan()


def test_a_model_that_has_exploded_wins_no_pair():
    lm = testbed_lm()
    with torch.no_grad():
        lm.linears[1].weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"frame 0 of row 0: .* codebook 2 of Moshi is nan"):
        pairs(lm, TestbedSource("few"), [SEGMENT], rows=2, fillers=[FAR])


def test_conversations_that_end_too_early_are_refused():
    class Short(Recorded):
        def pieces(self, rows, frames, seed):
            return super().pieces(rows, min(frames, 300), seed)

    with pytest.raises(ValueError, match=r"recorded, which end after 300 frames, got \[256, 512\]"):
        pairs(testbed_lm(), Short(), [SEGMENT, 2 * SEGMENT], rows=3, fillers=[FAR])


@pytest.mark.parametrize("lengths", [[], [100], [600, 300], [300, 300]])
def test_lengths_that_do_not_rise_are_refused(lengths):
    with pytest.raises(ValueError, match="lengths must rise from 256"):
        pairs(testbed_lm(), TestbedSource("few"), lengths, fillers=[FAR])


@pytest.mark.parametrize("fillers", [[], [30, 10], [10, 10]])
def test_fillers_that_do_not_rise_are_refused(fillers):
    with pytest.raises(ValueError, match="fillers must rise"):
        pairs(testbed_lm(), TestbedSource("few"), [SEGMENT], fillers=fillers)
