"""Sessions of something else than is streamed here: refused in one clear sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from data_support import tiny_mimi
from models import tiny_lm
from moshi.models.lm import LMGen
from moshi.modules.streaming import State
from session_support import (
    SETTINGS,
    begun,
    conditioned,
    moshi,
    refused,
    saved,
    talk,
    without_waiting_for_the_disk,  # noqa: F401
)

import ttt_cache

Change = Callable[[], LMGen]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("sessions"))


@pytest.fixture
def gen() -> LMGen:
    return begun()


def other_weight() -> LMGen:
    model = moshi(SETTINGS)
    with torch.no_grad():
        model.transformer.layers[1].gating.linear_in.weight.add_(1e-3)
    return talk(model, 2)


def other_adapter() -> LMGen:
    model = moshi(SETTINGS)
    with torch.no_grad():
        ttt_cache.adapter_parameters(model)[3].mul_(1.01)
    return talk(model, 2)


def without_patch() -> LMGen:
    return talk(tiny_lm(), 2)


def other_period() -> LMGen:
    return talk(moshi(SETTINGS, max_period=9999), 2)


OTHERS: dict[str, tuple[Change, str]] = {
    "weights": (
        lambda: talk(moshi(SETTINGS, seed=7), 2),
        r"model\.weights: the session was saved with \w+, here it is \w+",
    ),
    "one weight": (other_weight, r"model\.weights: "),
    "adapter": (other_adapter, r"model\.adapter: "),
    "codebooks": (
        lambda: talk(moshi(SETTINGS, n_q=5, delays=[0, 0, 1, 0, 1, 1]), 2),
        r"model\.codebooks: the session was saved with 5, here it is 6",
    ),
    "delays": (
        lambda: talk(moshi(SETTINGS, delays=[0, 0, 0, 0, 1]), 2),
        r"model\.delays: .* with \[0, 0, 1, 0, 1\], here it is \[0, 0, 0, 0, 1\]",
    ),
    "width": (lambda: talk(moshi(SETTINGS, dim=64), 2), r"model\.dim: .* 32, here it is 64"),
    "context": (lambda: talk(moshi(SETTINGS, context=50), 2), r"model\.context: .* here it is 50"),
    "rotation": (other_period, r"model\.structure: .* built otherwise"),
    "dtype": (
        lambda: talk(moshi(SETTINGS, dtype=torch.bfloat16), 2),
        r"model\.dtype: the session was saved with float32, here it is bfloat16",
    ),
    "no patch": (without_patch, r"model\.patched: .* here it is \[\]"),
    "layers": (
        lambda: talk(moshi({"layers": [0, 1]}), 2),
        r"model\.patched: .*layers\.2\.self_attn'\], here it is .*layers\.1\.self_attn'\]",
    ),
    "window": (
        lambda: talk(moshi({"layers": [0, 2], "recent": {0: 6, 2: 7}}), 2),
        r"settings\.transformer\.layers\.2\.self_attn\.recent: .* with 6, here it is 7",
    ),
    "gate": (
        lambda: talk(moshi({"layers": [0, 2], "gate": "head"}), 2),
        r"settings\.transformer\.layers\.0\.self_attn\.gate: .* with joint, here it is head",
    ),
    "guidance": (
        lambda: talk(moshi(SETTINGS), 2, cfg_coef=2.0, cfg_is_no_text=True),
        "guidance: the session was saved with False, here it is True",
    ),
    "batch": (
        lambda: talk(moshi(SETTINGS), 3),
        "holds 2 conversations, and gen streams 3 conversations: name the rows",
    ),
    "masked guidance": (
        lambda: talk(moshi(SETTINGS), 2, cfg_is_masked_until=[3, 3]),
        r"gen\.cfg_is_masked_until is in use here, and the session has none",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_session_of_something_else(other, file):
    make, match = OTHERS[other]
    refused(make(), file, ValueError, match)


def test_settings_that_change_nothing_in_a_conversation(file):
    gen = talk(moshi({**SETTINGS, "bptt": 2, "preset": "memory-bank"}), 2)
    ttt_cache.load_session(gen, file)


def test_conditions_that_are_not_in_use(tmp_path):
    model, told = conditioned("sum", ["calm", "glad"])
    gen = talk(model, 2, condition_tensors=told)
    path = ttt_cache.save_session(gen, tmp_path / "talk")
    gen._streaming_state.condition_sum = None
    refused(gen, path, ValueError, r"gen\.condition_sum is in the session, and not in use here")


def test_a_state_of_another_dtype(gen, file):
    attention = gen.lm_model.transformer.layers[1].self_attn
    ring = attention._streaming_state.kv_cache
    ring.cache = ring.cache.double()
    match = r"kv_cache\.cache must be torch\.float64 of shape .* got torch\.float32"
    refused(gen, file, ValueError, match)


@pytest.mark.parametrize(
    ("row", "error", "match"),
    [
        (2, ValueError, "row must be at most 1, got 2"),
        (-1, ValueError, "row must be at least 0, got -1"),
        (True, TypeError, "row must be an integer"),
        (0.5, TypeError, "row must be an integer"),
        ("0", TypeError, "row must be an integer"),
        ([0, 2], ValueError, "row must be at most 1, got 2"),
        ([], ValueError, "row must name each row once, and at least one"),
        ([1, 1], ValueError, "row must name each row once"),
        (1, ValueError, r"row must name 2 rows, as many as .* got \[1\]"),
    ],
)
def test_rows(gen, file, row, error, match, tmp_path):
    refused(gen, file, error, match, row=row)
    if not isinstance(row, list) and row != 1:
        with pytest.raises(error, match=match):
            ttt_cache.save_session(gen, tmp_path / "talk", row=row)
        assert not list(tmp_path.iterdir())


def test_models_that_are_not_streaming_or_no_models(gen, file, tmp_path):
    mimi = tiny_mimi()  # which other tests have used
    mimi.set_num_codebooks(4)
    at_rest = LMGen(tiny_lm())
    for wrong, given, error, match in [
        (gen.lm_model, {}, TypeError, "gen must be a moshi LMGen, got LMModel"),
        (at_rest, {}, RuntimeError, r"gen is not streaming: .* gen\.streaming\(batch_size\)"),
        (gen, {"mimi": gen}, TypeError, "mimi must be a MimiModel or None, got LMGen"),
        (gen, {"mimi": mimi}, RuntimeError, "mimi is not streaming"),
    ]:
        refused(wrong, file, error, match, **given)
        with pytest.raises(error, match=match):
            ttt_cache.save_session(wrong, tmp_path / "talk", **given)
    with mimi.streaming(3):
        refused(gen, file, ValueError, "mimi must stream 2 rows as gen does, got 3", mimi=mimi)
    with mimi.streaming(2):
        refused(gen, file, ValueError, "holds no Mimi: give none", mimi=mimi)
        path = ttt_cache.save_session(gen, tmp_path / "with", mimi=mimi)
        refused(gen, path, ValueError, "holds a Mimi: give mimi too")
        mimi.set_num_codebooks(3)
        refused(gen, path, ValueError, r"mimi\.codebooks: .* with 4, here it is 3", mimi=mimi)
        mimi.set_num_codebooks(4)
        ttt_cache.load_session(gen, path, mimi=mimi)


def test_states_that_are_not_known(gen, file, tmp_path):
    @dataclasses.dataclass
    class Novel(State):
        more: int = 0

    transformer = gen.lm_model.transformer
    known, transformer._streaming_state = transformer._streaming_state, Novel(2, "cpu")
    match = r"lm_model\.transformer has a streaming state of the type .*Novel"
    refused(gen, file, RuntimeError, match)
    with pytest.raises(RuntimeError, match=match):
        ttt_cache.save_session(gen, tmp_path / "talk")
    transformer._streaming_state = known
    kind = type(known)
    grown = dataclasses.make_dataclass("grown", [("more", int, 0)], bases=(kind,))
    grown.__module__, grown.__qualname__ = kind.__module__, kind.__qualname__
    known.__class__ = grown
    refused(gen, file, RuntimeError, "has a field 'more' that sessions do not know")
