"""Windows of a run, and which of them are degenerate."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from evaluation_support import habits_of, slow_loop
from models import random_codes, tiny_lm

from ttt_cache.evaluation import ngrams
from ttt_cache.evaluation.collapse import collapse
from ttt_cache.evaluation.freerun import divergence, drift

PADDING = 3


def test_windows_do_not_depend_on_the_pieces_and_hold_what_they_should():
    model = tiny_lm()
    codes = random_codes(model, 95) % 5
    found = habits_of(model, codes, 30, 95)
    assert found == habits_of(model, codes, 30, 7) == habits_of(model, codes, 30, 1)
    assert [(w["row"], w["start"]) for w in found["windows"]] == [
        (row, start) for start in (0, 30, 60, 90) for row in (0, 1)
    ]
    for window in found["windows"]:
        text, voice = codes[window["row"], :2, window["start"] : window["start"] + 30].tolist()
        said = [token for token in text if token not in (0, PADDING)]
        assert window["said"]["tokens"] == len(said) and window["voice"]["tokens"] == len(voice)
        assert window["silence"] == pytest.approx(1 - len(said) / len(text))
        assert window["said"]["entropy"] == pytest.approx(ngrams.entropy(np.array(said)))
        assert window["voice"]["loop"] == slow_loop(voice, 64)[0]


@pytest.mark.parametrize(("length", "first"), [(90, 60), (60, 30)])
def test_histograms_count_every_ngram_once(length, first):
    """Also those that lie across two windows; by halves, to which whole windows belong."""
    model = tiny_lm()
    codes = random_codes(model, length, batch=1)
    halves = habits_of(model, codes, 30, 8)["histograms"]["voice"]["2"]
    voice = codes[0, 1].tolist()
    pairs = [Counter(pairwise(voice[:first])), Counter(pairwise(voice[first - 1 :]))]
    for (buckets, counts), expected in zip(halves, pairs, strict=True):
        wanted = {a * model.card + b: count for (a, b), count in expected.items()}
        assert dict(zip(buckets, counts, strict=True)) == wanted


def test_missing_codes_are_left_out():
    model = tiny_lm()
    codes = random_codes(model, 40)
    codes[:, :2, 10:20] = model.zero_token_id
    windows = habits_of(model, codes, 20, 40)["windows"]
    assert [w["voice"]["tokens"] for w in windows] == [10, 10, 20, 20]
    assert all(w["silence"] >= 0.5 for w in windows[:2])


def told(windows, seed=0, loop=None, quiet=False):
    """A run that says random words, or repeats some."""
    model, rng = tiny_lm(), np.random.default_rng(seed)
    codes = rng.integers(4, 30, (1, 5, 100 * windows))
    if loop is not None:
        codes[0, :, 100 * loop :] = np.tile(codes[0, :, :5], 20 * (windows - loop))
    if quiet:
        codes[0, 0] = PADDING
    return habits_of(model, torch.from_numpy(codes), 100, 100)


def test_collapse_is_seen_and_nothing_else():
    reference = told(20)
    assert collapse(told(20, seed=1), reference) == 0
    stuck = told(20, seed=1, loop=15)
    assert collapse(stuck, reference) == 5 / 20
    assert collapse(json.loads(json.dumps(stuck)), reference) == 5 / 20
    assert collapse(told(20, seed=1, loop=19), reference) == 1 / 20
    assert collapse(told(20, seed=1, quiet=True), reference) == 1


@pytest.mark.parametrize("stream", ["said", "voice"])
@pytest.mark.parametrize(
    ("figure", "at", "beyond"),
    [("entropy", 2.0, 1.9), ("distinct", 0.25, 0.2), ("tokens", 20, 19), ("loop", 30, 31)],
)
def test_each_figure_alone_makes_a_window_degenerate(stream, figure, at, beyond):
    usual = {"entropy": 4.0, "distinct": 0.5, "tokens": 80, "loop": 15}

    def run(**changes):
        window = {name: dict(usual) for name in ("said", "voice")}
        window[stream] |= changes
        return {"windows": [window], "histograms": {"said": {}, "voice": {}}}

    assert collapse(run(**{figure: at}), run()) == 0
    assert collapse(run(**{figure: beyond}), run()) == 1


def test_divergence_and_drift_of_runs():
    one, other, stuck = told(20), told(20, seed=1), told(20, seed=1, loop=10)
    near, far = divergence(one, other), divergence(one, stuck)
    assert divergence(one, json.loads(json.dumps(one))) == {
        name: {"1": 0.0, "2": 0.0} for name in ("said", "voice")
    }
    for name in ("said", "voice"):
        for n in ("1", "2"):
            assert far[name][n] > near[name][n]
            assert drift(stuck)[name][n] > drift(one)[name][n]
    with pytest.raises(ValueError, match="streams"):
        divergence(one, {"histograms": {}})
