"""What is counted of a run's tokens, beside slow counts and by hand."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest
from evaluation_support import slow_loop

from ttt_cache.evaluation import ngrams


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
