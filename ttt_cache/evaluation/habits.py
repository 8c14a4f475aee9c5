"""What a speaker says over a long time, window by window: so that drift and collapse show."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from moshi.models.lm import LMModel
from torch import Tensor

from .ngrams import BUCKETS, bucketed, distinct, entropy, jensen_shannon, longest_loop, repeated

SEGMENT = 50  # tokens in which bigrams are compared: no more than a window has in any conversation
SEEN = 4  # tokens of the n-grams that are looked for in what was just said
LONGEST_PERIOD = 64  # tokens
DIVERGENCES = (1, 2)  # lengths of the n-grams whose shares are compared


class Stream(NamedTuple):
    """Tokens of one row and the frame of each, both int64 `[T]`."""

    tokens: np.ndarray
    at: np.ndarray


class Habits:
    """Takes in Moshi's side of B conversations piece by piece and keeps two windows of it.

    Two streams are looked at: `said`, the text without its padding, and `voice`, the first
    codebook of every frame. A window of either has

    - `tokens`: how many there are,
    - `entropy`: of its tokens, in bits,
    - `distinct`: share of bigrams that are different ones, within 50 tokens,
    - `repeated`: share of its 4-grams that were said in the `window` frames before them,
    - `loop`, `period`: tokens of the longest stretch that repeats itself, and after how many;

    and for the whole `silence`, the share of frames whose text is padding.

    Args:
        lm: whose codes these are.
        frames: length of the conversations; whatever comes after it is left out.
        window: frames.
    """

    def __init__(self, lm: LMModel, rows: int, frames: int, window: int) -> None:
        self._lm = lm
        self._cards = {"said": lm.text_card, "voice": lm.card}
        self._frames, self._window, self._at = frames, window, 0
        self._held: np.ndarray | None = None  # frames that do not fill a window yet
        self._before: list[dict[str, Stream]] = [{} for _ in range(rows)]
        self._windows: list[dict[str, Any]] = []
        self._counts: dict[tuple[str, int], list[np.ndarray]] = defaultdict(
            lambda: [np.zeros(BUCKETS, dtype=np.int64) for _ in range(2)]
        )

    def add(self, codes: Tensor) -> None:
        """The next frames: int64 `[B, 1 + dep_q or more, S]`, not delayed."""
        new = codes[:, :2].cpu().numpy()
        held = new if self._held is None else np.concatenate([self._held, new], axis=2)
        held = held[:, :, : self._frames - self._at]
        while (size := min(self._window, self._frames - self._at)) and held.shape[2] >= size:
            for row, window in enumerate(held[:, :, :size]):
                self._look(row, window)
            self._at += size
            held = held[:, :, size:]
        self._held = held

    def result(self) -> dict[str, Any]:
        """JSON-able: `windows`, one entry for each row and window, and `histograms`.

        A histogram counts n-grams in `BUCKETS` buckets, of the first half of the conversation and
        of the second, as lists of buckets and of their counts.
        """
        histograms: dict[str, dict[str, list[Any]]] = defaultdict(dict)
        for (name, n), halves in self._counts.items():
            histograms[name][str(n)] = [_sparse(counts) for counts in halves]
        return {"windows": self._windows, "histograms": dict(histograms)}

    def _look(self, row: int, codes: np.ndarray) -> None:
        """Close one window of a row, `[1 or 2, S]`."""
        text, start = codes[0], self._at
        words = spoken(self._lm, text)
        seen: dict[str, Any] = {"row": row, "start": start}
        seen["silence"] = float(1 - words.mean())
        at = start + np.arange(len(text))
        streams = {"said": Stream(text[words], at[words])}
        if len(codes) > 1:
            heard = codes[1] >= 0  # recordings mark what is missing
            streams["voice"] = Stream(codes[1][heard], at[heard])
        for name, now in streams.items():
            before = self._before[row].get(name, Stream(now.tokens[:0], now.at[:0]))
            seen[name] = self._figures(before, now, start)
            self._count(name, before, now, start)
            self._before[row][name] = now
        self._windows.append(seen)

    def _figures(self, before: Stream, now: Stream, start: int) -> dict[str, Any]:
        loop = longest_loop(now.tokens, LONGEST_PERIOD)
        both = (np.concatenate(pair) for pair in zip(before, now, strict=True))
        again = repeated(*both, n=SEEN, within=self._window, start=start)
        return {
            "tokens": len(now.tokens),
            "entropy": entropy(now.tokens),
            "distinct": _or_none(distinct(now.tokens, 2, SEGMENT)),
            "repeated": _or_none(again),
            "loop": loop.tokens,
            "period": loop.period,
        }

    def _count(self, name: str, before: Stream, now: Stream, start: int) -> None:
        half = int(2 * start >= self._frames)
        for n in DIVERGENCES:
            tail = before.tokens[len(before.tokens) - (n - 1) :]
            tokens = np.concatenate([tail, now.tokens])
            self._counts[name, n][half] += bucketed(tokens, n, self._cards[name])


def spoken(lm: LMModel, text: np.ndarray) -> np.ndarray:
    """Which text tokens are of words: neither padding nor missing; bool, any shape."""
    padding = lm.text_padding_token_id, lm.end_of_text_padding_id
    return (text >= 0) & ~np.isin(text, padding)


def divergence(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """How far what two runs say is apart: by stream and length of n-gram, in bits from 0 to 1.

    The Jensen-Shannon divergence of the n-grams' shares; hashed n-grams give a lower bound of it.
    Runs of finite length differ by chance, too: compare with `drift` of either, or with a run of
    another seed.

    Args:
        a, b: from `freerun`, or what it calls `recorded`, also read back from JSON.

    Raises:
        ValueError: they do not have the same streams.
    """
    first, second = a["histograms"], b["histograms"]
    if first.keys() != second.keys():
        raise ValueError(f"runs must have the same streams, got {[*first]} and {[*second]}")
    return {
        name: {n: _apart(_whole(halves), _whole(second[name][n])) for n, halves in lengths.items()}
        for name, lengths in first.items()
    }


def drift(run: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """As `divergence`, between the first half of a run and its second."""
    return {
        name: {n: _apart(*map(_dense, halves)) for n, halves in lengths.items()}
        for name, lengths in run["histograms"].items()
    }


def _apart(first: np.ndarray, second: np.ndarray) -> float | None:
    return _or_none(jensen_shannon(first, second))


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value  # JSON has no NaN


def _whole(halves: list[list[list[int]]]) -> np.ndarray:
    return np.sum([_dense(half) for half in halves], axis=0)


def _sparse(counts: np.ndarray) -> list[list[int]]:
    there = np.flatnonzero(counts)
    return [there.tolist(), counts[there].tolist()]


def _dense(sparse: list[list[int]]) -> np.ndarray:
    counts = np.zeros(BUCKETS, dtype=np.int64)
    counts[np.asarray(sparse[0], dtype=np.int64)] = sparse[1]
    return counts
