"""How much a stream of tokens repeats itself.

The measures are those of the literature on degenerate text: distinct n-grams (Li et al., "A
Diversity-Promoting Objective Function", arXiv 1510.03055), repetition of what was just said
(Welleck et al., "Neural Text Generation with Unlikelihood Training", arXiv 1908.04319, section 6),
entropy, and the longest loop (Holtzman et al., "The Curious Case of Neural Text Degeneration",
arXiv 1904.09751, figure 4).

Tokens are one-dimensional integer arrays.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

BUCKETS = 8192  # of a histogram
MULTIPLIER = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: Knuth's multiplicative hashing


def grams(tokens: np.ndarray, n: int) -> np.ndarray:
    """A number for each n-gram, the same where the n-gram is: int64 `[max(0, T - n + 1)]`."""
    _, names = np.unique(tokens, return_inverse=True)
    if len(tokens) < n:
        return np.zeros(0, dtype=np.int64)
    base, count = int(names.max()) + 1, len(tokens) - n + 1
    numbers = np.zeros(count, dtype=np.int64)
    for place in range(n):
        numbers = numbers * base + names[place : place + count]
    return numbers


def distinct(tokens: np.ndarray, n: int, segment: int) -> float:
    """Share of n-grams that are different ones, within segments of equally many tokens.

    The longer a text, the smaller that share; so it is taken of each segment, and what is left of
    the last counts only where there is no other. NaN where there are no n-grams.
    """
    pieces = [tokens[end - segment : end] for end in range(segment, len(tokens) + 1, segment)]
    numbers = [grams(piece, n) for piece in pieces or [tokens]]
    shares = [len(np.unique(each)) / len(each) for each in numbers if len(each)]
    return float(np.mean(shares)) if shares else float("nan")


def entropy(tokens: np.ndarray, n: int = 1) -> float:
    """Entropy of the n-grams' shares, in bits; 0 where there are none."""
    _, counts = np.unique(grams(tokens, n), return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def repeated(tokens: np.ndarray, at: np.ndarray, n: int, within: int, start: int) -> float:
    """Share of n-grams that were said before, not longer than `within` frames ago.

    Args:
        at: frame of each token, ascending.
        start: n-grams that end before this frame are looked back at, but not counted.

    Returns:
        NaN where none is counted.
    """
    numbers, ends = grams(tokens, n), at[n - 1 :]
    order = np.argsort(numbers, kind="stable")
    again = np.zeros(len(numbers), dtype=bool)
    same = numbers[order[1:]] == numbers[order[:-1]]
    again[order[1:]] = same & (ends[order[1:]] - ends[order[:-1]] <= within)
    counted = again[ends >= start]
    return float(counted.mean()) if len(counted) else float("nan")


class Loop(NamedTuple):
    """A stretch that repeats itself: `tokens` in a row, each what stood `period` before it."""

    tokens: int
    period: int


def longest_loop(tokens: np.ndarray, longest_period: int) -> Loop:
    """The longest stretch that is at least twice the same; `Loop(0, 0)` where there is none."""
    found = Loop(0, 0)
    for period in range(1, min(longest_period, len(tokens) // 2) + 1):
        broken = np.flatnonzero(tokens[period:] != tokens[:-period])
        edges = np.concatenate([[-1], broken, [len(tokens) - period]])
        kept = int(np.diff(edges).max()) - 1
        if kept >= period:  # of the same stretch `max` keeps the shortest period
            found = max(found, Loop(kept + period, period), key=lambda loop: loop.tokens)
    return found


def bucketed(tokens: np.ndarray, n: int, card: int) -> np.ndarray:
    """How often n-grams fall into `BUCKETS` buckets, int64 `[BUCKETS]`.

    Where there are no more than `BUCKETS` n-grams of `card` tokens each has a bucket of its own;
    else they are hashed.
    """
    count = max(0, len(tokens) - n + 1)
    numbers = np.zeros(count, dtype=np.uint64)
    for place in range(n):
        numbers = numbers * np.uint64(card) + tokens[place : place + count].astype(np.uint64)
    if card**n > BUCKETS:
        shift = np.uint64(64 - BUCKETS.bit_length() + 1)
        numbers = (numbers * np.uint64(MULTIPLIER)) >> shift
    return np.bincount(numbers.astype(np.int64), minlength=BUCKETS)


def jensen_shannon(first: np.ndarray, second: np.ndarray) -> float:
    """Jensen-Shannon divergence of two histograms in bits: 0 for the same shares, at most 1.

    Lin, "Divergence measures based on the Shannon entropy", 1991. NaN where one is empty.
    """
    if not first.sum() or not second.sum():
        return float("nan")
    p, q = first / first.sum(), second / second.sum()
    mean = (p + q) / 2

    def relative(shares: np.ndarray) -> float:
        some = shares > 0
        return float((shares[some] * np.log2(shares[some] / mean[some])).sum())

    return max(0.0, (relative(p) + relative(q)) / 2)
