"""Segments: equal to the whole session delayed once, whatever their lengths and the processes."""

from __future__ import annotations

import json

import pytest
import torch
from data_support import FACTS, TensorSessions, random_sessions
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_lm
from torch import Tensor

from ttt_cache.training.data import Batch, LMFacts, SegmentStream
from ttt_cache.training.data.sessions import join

session_lengths = st.lists(st.integers(1, 25), min_size=1, max_size=6)
segment_lengths = st.lists(st.integers(1, 12), min_size=1, max_size=12)


def take(stream: SegmentStream, lengths: list[int]) -> list[Batch]:
    return [stream.next_batch(length) for length in lengths]


def assert_same(actual: list[Batch], expected: list[Batch]) -> None:
    assert len(actual) == len(expected)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours.codes, theirs.codes)
        assert torch.equal(ours.fresh, theirs.fresh)


def seen(batches: list[Batch], row: int) -> list[Tensor]:
    """The sessions of a row as its segments show them, without the overlapping columns."""
    sessions: list[Tensor] = []
    for batch in batches:
        codes = batch.codes[row]
        if batch.fresh[row]:
            sessions.append(codes)
        else:
            assert torch.equal(sessions[-1][:, -1], codes[:, 0]), "segments overlap by one column"
            sessions[-1] = torch.cat([sessions[-1], codes[:, 1:]], dim=1)
    return sessions


def model_inputs(codes: Tensor) -> Tensor:
    """What LMModel.forward makes of the codes of a session, caught on its way in."""
    model = tiny_lm(dim=8, num_heads=2, num_layers=1)
    caught: list[Tensor] = []
    forward_text, forward_depformer = model.forward_text, model.forward_depformer_training

    def catch_text(sequence: Tensor, *rest):
        caught.append(sequence)
        return forward_text(sequence, *rest)

    def catch_depformer(sequence: Tensor, transformer_out: Tensor):
        caught.append(sequence)
        return forward_depformer(sequence, transformer_out)

    model.forward_text, model.forward_depformer_training = catch_text, catch_depformer
    with torch.no_grad():
        model(codes[None])
    inputs, targets = caught
    assert torch.equal(inputs[:, :, 1:], targets[:, :, :-1])
    return torch.cat([inputs, targets[:, :, -1:]], dim=2)[0]


@pytest.mark.parametrize("length", [1, 2, 9])
def test_delayed_codes_are_what_the_model_builds(length: int) -> None:
    codes = random_sessions([length]).tensors[0]
    assert torch.equal(FACTS.delayed(codes), model_inputs(codes))


@pytest.mark.parametrize("length", [1, 2, 9])
def test_predicted_is_the_models_mask(length: int) -> None:
    codes = random_sessions([length]).tensors[0]
    codes[2, length // 2 :] = FACTS.zero
    model = tiny_lm(dim=8, num_heads=2, num_layers=1)
    with torch.no_grad():
        out = model(codes[None])
    delayed = FACTS.delayed(codes)
    mask = FACTS.predicted(delayed[None])[0]
    for stream, theirs in enumerate([out.text_mask[0, 0], *out.mask[0]]):
        assert mask[stream].sum() == theirs.sum()
        assert torch.equal(delayed[stream, 1:][mask[stream]], codes[stream][theirs])


@given(session_lengths, segment_lengths, st.integers(1, 4))
def test_segments_are_the_sessions_delayed_once(
    sessions: list[int], segments: list[int], rows: int
) -> None:
    source = random_sessions(sessions)
    batches = take(SegmentStream(source, FACTS, rows), segments)
    for row in range(rows):
        for count, codes in enumerate(seen(batches, row)):
            whole = FACTS.delayed(source.codes((row + count * rows) % len(sessions)))
            length = min(codes.shape[1], whole.shape[1])
            assert torch.equal(codes[:, :length], whole[:, :length])
            assert (codes[:, length:] == FACTS.zero).all()


@given(session_lengths, segment_lengths, st.booleans())
def test_a_session_ends_with_its_last_target(
    sessions: list[int], segments: list[int], shuffle: bool
) -> None:
    source = random_sessions(sessions)
    stream = SegmentStream(source, FACTS, 1, shuffle=shuffle, seed=3)
    whole = seen(take(stream, segments * 5), 0)[:-1]
    for codes in whole:
        length = int((codes[0] != FACTS.zero).sum()) - 1
        assert length in sessions
        before_last = codes.shape[1] - 1 - max(segments)
        assert before_last < length, "a segment without any frame of the session"
    for begin in range(0, len(whole) - len(sessions) + 1, len(sessions)):
        epoch = whole[begin : begin + len(sessions)]
        lengths = sorted(int((codes[0] != FACTS.zero).sum()) - 1 for codes in epoch)
        assert lengths == sorted(sessions), "an epoch has every session once"


@given(session_lengths, segment_lengths, st.booleans())
def test_two_processes_see_what_one_sees(
    sessions: list[int], segments: list[int], shuffle: bool
) -> None:
    source = random_sessions(sessions)

    def stream(rows: range) -> SegmentStream:
        return SegmentStream(source, FACTS, 4, rows, seed=5, shuffle=shuffle)

    whole, first, second = stream(range(4)), stream(range(2)), stream(range(2, 4))
    for length in segments:
        one, a, b = (each.next_batch(length) for each in (whole, first, second))
        assert torch.equal(one.codes, torch.cat([a.codes, b.codes]))
        assert torch.equal(one.fresh, torch.cat([a.fresh, b.fresh]))
    assert whole.state_dict() == first.state_dict() == second.state_dict()


@given(session_lengths, segment_lengths, st.integers(0, 12), st.booleans())
def test_a_resumed_stream_goes_on_exactly(
    sessions: list[int], segments: list[int], stop: int, shuffle: bool
) -> None:
    source = random_sessions(sessions)

    def stream(rows: range = range(3)) -> SegmentStream:
        return SegmentStream(source, FACTS, 3, rows, seed=1, shuffle=shuffle)

    straight = take(stream(), segments)
    stopped = stream(range(1))  # another number of processes wrote the state
    take(stopped, segments[:stop])
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = stream()
    take(resumed, [7, 2])  # what it did before must not matter
    resumed.load_state_dict(state)
    assert_same(take(resumed, segments[stop:]), straight[stop:])


def test_shuffle_follows_seed_and_epoch() -> None:
    source = random_sessions([4] * 8)

    def epochs(seed: int) -> list[Tensor]:
        stream = SegmentStream(source, FACTS, 8, seed=seed, shuffle=True)
        return [stream.next_batch(4).codes for _ in range(2)]

    first, again, other = epochs(0), epochs(0), epochs(1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_one_session_per_row_is_loaded_once() -> None:
    source = random_sessions([10, 10, 10])
    loaded: list[int] = []
    codes = source.codes
    source.codes = lambda session: loaded.append(session) or codes(session)
    take(SegmentStream(source, FACTS, 2), [4] * 6)
    assert loaded == [0, 1, 2, 0]


def test_bad_streams_are_refused() -> None:
    source = random_sessions([3, 4])
    with pytest.raises(ValueError, match=r"rows must be within range\(2\), got range\(1, 3\)"):
        SegmentStream(source, FACTS, 2, range(1, 3))
    with pytest.raises(ValueError, match="at least one session"):
        SegmentStream(TensorSessions([]), FACTS, 1)
    with pytest.raises(ValueError, match="frames must be at least 1, got 0"):
        SegmentStream(source, FACTS, 1).next_batch(0)
    state = SegmentStream(source, FACTS, 2, seed=1).state_dict()
    for stream, name in (
        (SegmentStream(source, FACTS, 4, seed=1), "total_rows 2, here it is 4"),
        (SegmentStream(source, FACTS, 2, seed=2), "seed 1, here it is 2"),
        (SegmentStream(source, FACTS, 2, seed=1, shuffle=True), "shuffle False"),
        (SegmentStream(random_sessions([3, 5]), FACTS, 2, seed=1), "session_lengths"),
    ):
        with pytest.raises(ValueError, match=name):
            stream.load_state_dict(state)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(0, 80))
def test_recordings_join_in_order(frames: list[int], least: int) -> None:
    groups = join(frames, least)
    assert [i for group in groups for i in group] == list(range(len(frames)))
    totals = [sum(frames[i] for i in group) for group in groups]
    assert min(totals) >= min(least, sum(frames))
    for group in groups[:-1]:
        assert sum(frames[i] for i in group[:-1]) < max(least, 1), "no longer than needed"
    if least == 0:
        assert len(groups) == len(frames)


def test_models_of_one_voice_and_others() -> None:
    facts = LMFacts.of(tiny_lm(n_q=2, delays=[0, 0, 1]))
    assert (facts.channels, facts.codebooks, facts.initial) == (1, 3, (40, 30, 30))
    assert (FACTS.channels, FACTS.codebooks) == (2, 5)
    with pytest.raises(ValueError, match="n_q 3 and dep_q 2"):
        LMFacts.of(tiny_lm(n_q=3, delays=[0, 0, 1, 1]))
