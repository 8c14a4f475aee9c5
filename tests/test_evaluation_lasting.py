"""Conversations that go on from step to step, and the memory that learns from them."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice, pairwise

import pytest
import torch
from evaluation_support import CONTEXT, SETTINGS, random_codes, recipe, tiny
from hypothesis import given
from hypothesis import strategies as st

import ttt_cache
from ttt_cache.evaluation import lasting as module
from ttt_cache.evaluation.delays import Delays
from ttt_cache.evaluation.lasting import Part, conversations, lasting, slow_down
from ttt_cache.evaluation.recipe import Course
from ttt_cache.evaluation.source import TestbedSource
from ttt_cache.evaluation.tune import learn, tuning
from ttt_cache.training.data import LMFacts

FEW = TestbedSource("few")
LAST = Course(((16, 2, 3),), lr=3e-3)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.booleans())
def test_delays_are_those_of_the_whole(lengths, again):
    """Cut anywhere, also by a row that begins anew while the other goes on."""
    lm = tiny(delays=[0, 0, 2, 0, 1])
    facts, codes = LMFacts.of(lm), random_codes(lm, sum(lengths))
    whole = torch.stack([facts.delayed(row) for row in codes])
    delays, start = Delays(facts, 2), 0
    if again:
        delays.take(random_codes(lm, 5, seed=2))
    fresh = torch.tensor([True, True]) if again else None
    for length in lengths:
        taken = delays.take(codes[:, :, start : start + length], fresh)
        assert torch.equal(taken, whole[:, :, start : start + length + 1])
        start, fresh = start + length, torch.tensor([False, False])


def test_conversations_have_every_length_and_begin_afresh():
    parts = list(islice(conversations(FEW, 8, 16, "seed"), 400))
    assert all(part.codes.shape == (1, 5, 8) for part in parts)
    begins = [number for number, part in enumerate(parts) if part.fresh]
    lengths = {after - before for before, after in pairwise(begins)}
    assert begins[0] == 0 and min(lengths) == 1 and 8 < max(lengths) <= 16
    again = list(islice(conversations(FEW, 8, 16, "seed"), 20))
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(again, parts, strict=False))


def test_conversations_are_no_longer_than_what_was_recorded(monkeypatch):
    """Of at most 75 frames: 9 parts of 8."""
    source = TestbedSource("few")
    monkeypatch.setattr(source, "longest", 75)
    begins = [p.fresh for p in islice(conversations(source, 8, 256, "seed"), 300)]
    starts = [number for number, fresh in enumerate(begins) if fresh]
    assert 6 < max(after - before for before, after in pairwise(starts)) <= 9


def test_its_losses_are_those_of_the_whole_conversation(monkeypatch):
    """By Moshi's own loss: two parts of 16 frames are one sequence of 32, memory and all."""
    lm, codes = tiny(), random_codes(tiny(), 32)

    def talk(source, frames, longest, seed):
        row = int(seed[-1])
        for number, part in enumerate(codes[row : row + 1].split(frames, dim=2)):
            yield Part(part, number == 0)

    monkeypatch.setattr(module, "conversations", talk)
    steps = replace(recipe(moshi=1.0, text_padding=1.0), last=Course(((16, 2, 2),), lr=1e-3))
    with ttt_cache.patch(lm, **SETTINGS) as handle:
        parts = [loss.item() for loss in lasting(lm, handle, FEW, steps, 0)]
        (whole,) = tuning(lm, handle, [codes], steps)
    # Text has 16 codes in each part, so its means weigh alike; audio lacks one, by its delay.
    assert sum(parts) / 2 == pytest.approx(whole.item(), rel=2e-2)


@pytest.mark.parametrize(("rows", "expected"), [(1, [9]), (5, [1, 1, 9, 9, 9])])
def test_half_of_the_rows_begin_anew_in_every_step(monkeypatch, rows, expected):
    asked, real = [], module.conversations

    def talk(source, frames, longest, seed):
        asked.append(longest)
        return real(source, frames, longest, seed)

    monkeypatch.setattr(module, "conversations", talk)
    steps = replace(recipe(), last=Course(((8, rows, 1),), lr=1e-3), longest=9)
    lm = tiny()
    with ttt_cache.patch(lm, **SETTINGS) as handle:
        next(lasting(lm, handle, FEW, steps, 0))
    assert asked == expected


@pytest.mark.parametrize("share", (False, True))
def test_layers_before_the_last_are_slowed_down_once(share):
    lm = tiny()
    with ttt_cache.patch(lm, share=share, depth=3, **SETTINGS) as handle:
        before = [cache.memory.fast.step_size.sigmoid() for cache in handle.caches.values()]
        slow_down(handle, 20)
        for rate, cache in zip(before, handle.caches.values(), strict=True):
            torch.testing.assert_close(cache.memory.fast.step_size.sigmoid(), rate / 20)
    with ttt_cache.patch(lm, memory="ttt-linear", recent=6) as handle:
        slow_down(handle, 20)  # nothing to slow down


def test_a_teacher_that_keeps_everything_has_nothing_to_teach_itself():
    lm = tiny()
    steps = replace(recipe(), last=LAST)
    with ttt_cache.patch(lm, memory="none", recent=CONTEXT) as handle:
        losses = [loss.item() for loss in lasting(lm, handle, FEW, steps, 0)]
    assert losses == pytest.approx([0, 0, 0], abs=1e-6)
    with ttt_cache.patch(lm, memory="none", recent=3) as handle:
        assert min(loss.item() for loss in lasting(lm, handle, FEW, steps, 0)) > 1e-4


def test_a_memory_learns_from_it():
    lm = tiny()
    steps = replace(recipe(), last=LAST)
    with ttt_cache.patch(lm, **SETTINGS) as handle:
        before = [p.clone() for p in ttt_cache.adapter_parameters(lm)]
        given_losses = lasting(lm, handle, FEW, steps, 0)
        assert len(learn(lm, handle, steps.last, given_losses, "last", progress=False)) == 3
        after = ttt_cache.adapter_parameters(lm)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
