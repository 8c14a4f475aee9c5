"""Arms of `ttt-cache bench`, and that no speed of wrong answers can be had."""

from __future__ import annotations

import math
import sys
import types
from dataclasses import replace

import pytest
import torch
from bench_support import PATCHED, PLACE, small

from ttt_cache.bench import peers
from ttt_cache.bench.arms import Arm, arms_of
from ttt_cache.bench.check import ALLOWED, WrongAnswerError, check, off
from ttt_cache.bench.core import Core
from ttt_cache.bench.measure import build


def test_cores_of_a_place_are_one_layer():
    one, other = (Core(PLACE, 40, PATCHED) for _ in range(2))
    for _ in range(30):
        ((x,), (p,)) = PLACE.frames(1)
        assert torch.equal(one.step(x, p), other.step(x, p))
    assert one.state is not None and one.state.readout.abs().max() > 0
    values = one.cache.reader.to_value  # or a memory would show nothing
    assert values.std() > 0.01


def test_every_arm_that_the_cpu_has_passes_its_check():
    arms, absent = arms_of(small())
    names = ["stock 40", "stock 90", "patched", "window", "two SDPA"]
    assert [arm.name for arm in arms] == names
    assert absent.keys() == {"patched, triton", "FlexAttention", "FlashInfer window"}
    assert "must be an NVIDIA GPU" in absent["patched, triton"]
    built, missing = build(arms, PLACE)
    seen = []
    apart = check(built, PLACE, 6, 8, 46, lambda: seen.append(1))
    assert not missing and len(seen) == 46
    assert apart.keys() == {"patched", "window", "two SDPA"}
    assert 0 < max(apart.values()) < ALLOWED[torch.float32]


@pytest.mark.parametrize(
    ("first", "said"),
    [(1, "is not stock Moshi at frame 1"), (14, "is not the reference path at frame 14")],
)
def test_no_speed_of_wrong_answers(first, said):
    """An arm that is wrong from some frame on; the memory is first read at frame 14."""

    def wrong(core):
        attend, calls = peers.two_sdpa(core), []

        def attend_wrongly(q, keys, values, seen):
            calls.append(seen)
            found = attend(q, keys, values, seen)
            late = sum(one is not None for one in calls) >= first
            return found * 1.01 if late else found

        return attend_wrongly

    arm = Arm("wrong", "", 90, PATCHED | {"gate": "head"}, peer=wrong)
    with pytest.raises(WrongAnswerError, match=f"wrong {said}: .*Nothing was timed"):
        check({"wrong": (arm, arm.build(PLACE))}, PLACE, 6, 8, 46)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flexattention_sees_what_it_may(monkeypatch):
    """Not compiled: that takes a GPU."""
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)
    arm = Arm("flex", "", 90, PATCHED | {"gate": "head"}, peer=peers.flex)
    apart = check({"flex": (arm, arm.build(PLACE))}, PLACE, 6, 8, 40)
    assert 0 < apart["flex"] < 1e-5


class FakeWrapper:
    """What FlashInfer's documentation says of its wrapper, in PyTorch."""

    def __init__(self, room, layout, **buffers):
        assert layout == "HND" and buffers["use_cuda_graph"]

    def plan(self, starts, pages, lengths, heads, kv_heads, width, page, **dtypes):
        assert starts.tolist() == [0, 1, 2] and pages.tolist() == [0, 1]
        assert lengths.tolist() == [page] * 2 and (heads, kv_heads, width) == (2, 2, 32)

    def run(self, q, cache):
        keys, values = cache  # [pages, heads, page, width]
        scores = (q[:, :, None] @ keys.transpose(-1, -2)) / 32**0.5
        return (scores.softmax(-1) @ values)[:, :, 0]


def test_flashinfer_reads_a_full_ring_as_one_page(monkeypatch):
    fake = types.ModuleType("flashinfer")
    monkeypatch.setattr(fake, "BatchDecodeWithPagedKVCacheWrapper", FakeWrapper, raising=False)
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    settings, peer = {"recent": 6, "memory": "none"}, peers.flashinfer_window
    arm = Arm("full", "", 90, settings, peer=peer, partial=False)
    apart = check({"full": (arm, arm.build(PLACE))}, PLACE, 6, 8, 20)
    assert 0 < apart["full"] < 1e-5
    early = replace(arm, partial=True)  # before its window is full it sees empty slots
    with pytest.raises(WrongAnswerError, match="frame 1"):
        check({"full": (early, early.build(PLACE))}, PLACE, 6, 8, 20)


def test_nan_is_wrong():
    assert math.isnan(off(torch.tensor([math.nan]), torch.ones(1)))
    arm = Arm("broken", "", 90, PATCHED, peer=lambda core: lambda q, *rest: q * math.nan)
    with pytest.raises(WrongAnswerError, match="off by nan"):
        check({"broken": (arm, arm.build(PLACE))}, PLACE, 6, 8, 10)


def test_what_cannot_be_set_up_is_said_unless_it_is_ours():
    def fail(core):
        raise OSError("no library")

    good, bad = Arm("own", "", 90, PATCHED), Arm("other", "", 90, PATCHED, peer=fail)
    built, absent = build([good, bad], PLACE)
    assert list(built) == ["own"]
    assert absent == {"other": "it could not be set up: no library"}
    with pytest.raises(ValueError, match="TTT_CACHE_BACKEND=triton cannot be had"):
        build([Arm("own", "", 90, PATCHED, "triton")], PLACE)
