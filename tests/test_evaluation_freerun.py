"""Free runs: what is counted, beside slow counts, and that LMGen is stepped as in training."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from models import SMALL, random_codes, stir, tiny_lm
from moshi.models.lm import LMGen

import ttt_cache
from ttt_cache.evaluation import ngrams
from ttt_cache.evaluation.collapse import collapse
from ttt_cache.evaluation.freerun import divergence, drift, freerun
from ttt_cache.evaluation.generation import generate
from ttt_cache.evaluation.habits import Habits
from ttt_cache.evaluation.source import Piece

PADDING = 3
GREEDY = {"use_sampling": False}


class Recording:
    """A source of random conversations, as long as asked or as long as it is."""

    name = "recording"

    def __init__(self, model, length: int | None = None, piece: int = 7) -> None:
        self.model, self.length, self.piece = model, length, piece

    def codes(self, rows: int, frames: int, seed: int):
        return random_codes(self.model, self.length or frames, rows, seed)

    def pieces(self, rows, frames, seed):
        for part in self.codes(rows, frames, seed).split(self.piece, dim=2):
            yield Piece(part, {})


def slow_grams(tokens, n):
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [1, 2, 4])
def test_distinct_and_entropy_by_counting(seed, n):
    rng = random.Random(seed)
    tokens = [rng.choice([2, 3, 5, 70_000]) for _ in range(rng.randint(n, 200))]
    segments = [tokens[i : i + 20] for i in range(0, len(tokens) - 19, 20)] or [tokens]
    shares = [len(set(slow_grams(s, n))) / len(slow_grams(s, n)) for s in segments]
    array = np.array(tokens)
    assert ngrams.distinct(array, n, 20) == pytest.approx(sum(shares) / len(shares))
    counts = Counter(slow_grams(tokens, n))
    total = sum(counts.values())
    expected = -sum(c / total * math.log2(c / total) for c in counts.values())
    assert ngrams.entropy(array, n) == pytest.approx(expected)


def test_entropy_that_is_known():
    assert ngrams.entropy(np.arange(8)) == pytest.approx(3)
    assert ngrams.entropy(np.array([7, 7, 7])) == 0
    assert ngrams.entropy(np.array([1, 1, 2, 3])) == pytest.approx(1.5)
    assert ngrams.entropy(np.array([], dtype=int)) == 0


def test_distinct_ngrams_that_are_known():
    tokens = np.array([1, 2, 3, 4, 5, 5, 5, 5, 6, 7])
    assert ngrams.distinct(tokens[:8], 2, 4) == pytest.approx((1 + 1 / 3) / 2)
    assert ngrams.distinct(tokens, 2, 4) == ngrams.distinct(tokens[:8], 2, 4)
    assert ngrams.distinct(tokens[4:7], 2, 4) == pytest.approx(1 / 2)
    assert math.isnan(ngrams.distinct(np.array([4]), 2, 50))


@pytest.mark.parametrize("seed", range(6))
def test_repetition_by_looking_back(seed):
    rng = random.Random(seed)
    tokens = [rng.randrange(3) for _ in range(120)]
    at = sorted(rng.sample(range(400), len(tokens)))
    n, within, start = 3, rng.choice([10, 60, 400]), rng.choice([0, 150])
    seen, counted = 0, 0
    for i in range(n - 1, len(tokens)):
        if at[i] < start:
            continue
        counted += 1
        own = tokens[i - n + 1 : i + 1]
        earlier = (j for j in range(n - 1, i) if at[i] - at[j] <= within)
        seen += any(tokens[j - n + 1 : j + 1] == own for j in earlier)
    found = ngrams.repeated(np.array(tokens), np.array(at), n, within, start)
    assert found == pytest.approx(seen / counted)


def slow_loop(tokens, longest):
    best = (0, 0)
    for period in range(1, longest + 1):
        for begin in range(len(tokens)):
            end = begin + period
            while end < len(tokens) and tokens[end] == tokens[end - period]:
                end += 1
            if end - begin >= 2 * period and end - begin > best[0]:
                best = (end - begin, period)
    return best


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_loop_by_trying_all(seed):
    rng = random.Random(seed)
    tokens = [rng.randrange(2 + seed % 3) for _ in range(rng.randint(1, 40))]
    assert ngrams.longest_loop(np.array(tokens), 6) == slow_loop(tokens, 6)


def test_loops_by_hand():
    loop = ngrams.longest_loop(np.array([9, 1, 2, 3, 1, 2, 3, 1, 2, 8]), 64)
    assert loop == (8, 3)
    assert ngrams.longest_loop(np.array([1, 2, 3]), 64) == (0, 0)
    assert ngrams.longest_loop(np.array([1] * 5), 64) == (5, 1)
    assert ngrams.longest_loop(np.array([], dtype=int), 64) == (0, 0)


def test_divergence_that_is_known():
    half, other = np.array([1, 1, 0, 0]), np.array([0, 0, 5, 5])
    assert ngrams.jensen_shannon(half, 7 * half) == 0
    assert ngrams.jensen_shannon(half, other) == pytest.approx(1)
    # One of two equally likely tokens instead of both: H(3/4, 1/4) - 1/2.
    one = np.array([1, 0, 0, 0])
    expected = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5
    assert ngrams.jensen_shannon(half, one) == pytest.approx(expected)
    assert math.isnan(ngrams.jensen_shannon(half, 0 * half))


def test_buckets_are_exact_where_there_are_enough_and_spread_where_not():
    tokens = np.array([0, 1, 0, 1, 89, 0])
    counts = ngrams.bucketed(tokens, 2, 90)
    assert counts.sum() == 5 and counts[1] == 2 and counts[90] == 1 and counts[89 * 90] == 1
    many = ngrams.bucketed(np.arange(5000), 2, 32_000)
    assert many.sum() == 4999 and len(many) == ngrams.BUCKETS and many.max() < 8
    assert (many == ngrams.bucketed(np.arange(5000), 2, 32_000)).all()


def habits_of(model, codes, window, piece):
    habits = Habits(model, codes.shape[0], codes.shape[2], window)
    for part in codes.split(piece, dim=2):
        habits.add(part)
    return habits.result()


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


@torch.no_grad()
def test_frames_are_those_of_training():
    """Greedy, the next frame is what `forward` finds likeliest after the same frames."""
    model = tiny_lm()
    heard = random_codes(model, 24, batch=2)[:, 3:]
    said = torch.cat([g.codes for g in generate(model, heard.split(5, 2), 2, 0, GREEDY)], dim=2)
    assert said.shape == (2, 3, 23)  # the last frame waits for its delayed codebook
    codes = torch.cat([said, heard[:, :, :23]], dim=1)
    out = model(codes)
    known = ~out.text_logits[:, 0].isnan().any(-1)
    assert torch.equal(out.text_logits[:, 0].argmax(-1)[known], said[:, 0][known])
    for k in range(2):
        known = out.mask[:, k]
        assert torch.equal(out.logits[:, k].argmax(-1)[known], said[:, 1 + k][known])


def test_the_run_is_lmgens():
    """Sampling and all, whatever the pieces; and the caller's random numbers are left alone."""
    model = tiny_lm()
    heard = random_codes(model, 30, batch=1)[:, 3:]
    torch.manual_seed(5)
    state, expected = torch.get_rng_state(), []
    generator = LMGen(model)
    ahead = torch.cat([torch.zeros_like(heard[:, :, :1]), heard[:, :, :-1]], dim=2)
    with generator.streaming(1):
        for frame in ahead.split(1, dim=2):
            if (codes := generator.step(frame)) is not None:
                expected.append(codes)
    torch.set_rng_state(state)
    for size in (30, 4):
        pieces = []
        for generated in generate(model, heard.split(size, 2), 1, 5):
            pieces.append(generated.codes)
            torch.rand(3)
        assert torch.equal(torch.cat(pieces, 2), torch.cat(expected, 2))
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.rand(3 * (1 + 8))
    torch.set_rng_state(state)
    for _ in range(1 + 8):
        torch.rand(3)
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("layers", [None, [0, 2], "stock"])
def test_a_run_of_any_model(layers):
    model = tiny_lm()
    if layers != "stock":
        ttt_cache.patch(model, layers=layers, **SMALL)
        stir(model)
    source = Recording(model)
    run = freerun(model, source, 100, 3, rows=2, window=40)
    assert json.loads(json.dumps(run, allow_nan=False)) == run
    assert [w["start"] for w in run["windows"]] == [0, 0, 40, 40, 80, 80]
    assert run["state_bytes"]["start"] == run["state_bytes"]["end"] == run["state_bytes"]["most"]
    assert 0 < run["step_ms"]["p50"] <= run["step_ms"]["p99"]
    recorded = habits_of(model, source.codes(2, 101, 3)[:, :3, :100], 40, 100)
    assert run["recorded"] == recorded
    again = freerun(model, source, 100, 3, rows=2, window=40)
    assert again["windows"] == run["windows"]
    assert freerun(model, source, 100, 4, rows=2, window=40)["windows"] != run["windows"]
    assert not model.transformer.is_streaming


def test_settings_reach_lmgen():
    model = tiny_lm()
    runs = [freerun(model, Recording(model), 50, 0, settings=GREEDY) for _ in range(2)]
    sampled = freerun(model, Recording(model), 50, 0)
    assert runs[0]["windows"] == runs[1]["windows"] != sampled["windows"]


def test_a_model_that_only_listens():
    """Speech to text: no depformer, all codebooks are the user's."""
    model = tiny_lm(dep_q=0, n_q=2, delays=[0, 0, 0])
    run = freerun(model, Recording(model), 40, 0, window=20)
    assert [w.keys() & {"said", "voice"} for w in run["windows"]] == [{"said"}] * 2
    assert divergence(run, run) == {"said": {"1": 0.0, "2": 0.0}}


def test_refusals():
    model = tiny_lm()
    source = Recording(model)
    for name in ("frames", "rows", "window"):
        given = {"frames": 5, "rows": 1, "window": 5, name: 0}
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            freerun(model, source, seed=0, **given)
    with pytest.raises(ValueError, match="recording must have 101 frames"):
        freerun(model, Recording(model, length=60), 100, 0)
    with pytest.raises(ValueError, match="n_q = dep_q = 2"):
        freerun(tiny_lm(n_q=2, delays=[0, 0, 1]), source, 5, 0)
    with pytest.raises(ValueError, match="eval mode"):
        freerun(tiny_lm().train(), source, 5, 0)
    with pytest.raises(ValueError, match=r"shape \[2, 2, S\].*got \[1, 2, 4\]"):
        next(generate(model, [torch.zeros(1, 2, 4, dtype=torch.long)], 2, 0))
    with pytest.raises(ValueError, match="at most 30, the model's card, got 31"):
        next(generate(model, [torch.full((2, 2, 4), 31)], 2, 0))
    assert not model.is_streaming
    with model.streaming(1), pytest.raises(RuntimeError, match="run freely while it is streaming"):
        freerun(model, source, 5, 0)
