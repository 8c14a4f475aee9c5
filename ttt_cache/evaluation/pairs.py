"""Paired likelihoods: is what is right more likely than what is not, long after it was told?

Zero-shot, as sWUGGY and sBLIMP (arXiv 2011.11588) and the spoken StoryCloze (arXiv 2305.13009) are
for speech models. Filler comes behind the evidence, as much as is wanted: enough to put it beyond
the window, or beyond stock Moshi's ring.

The likelihood of a continuation is that of all its tokens of Moshi's streams, text and codebooks,
each given those before it. Codes that one of the two lacks count in neither.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from moshi.models.lm import LMModel
from torch import Tensor

from ttt_cache.checks import whole_number

from .continuations import RecordedTeller, Teller, TestbedTeller
from .forced import Forcing
from .intervals import bootstrap
from .source import SEGMENT, Conversations, Piece
from .tally import Tally, ratio


class Place(NamedTuple):
    """Where questions are asked, in frames."""

    length: int
    filler: int


class Pairs:
    """How often the right continuation is the more likely one, by kind, length and filler.

    Attributes:
        places: frames that were heard before, and how many of filler came behind these.
        better, margin: by kind tallies over places, of 1 where the right one is more likely (0.5
            where both are alike), and of the nats by which it is.
    """

    def __init__(self, kinds: Sequence[str], places: Sequence[Place], rows: int) -> None:
        self.places = [Place(*place) for place in places]

        def tallies() -> dict[str, Tally]:
            empty = torch.zeros(2, rows, len(places), dtype=torch.float64)
            return {kind: Tally(*empty.clone()) for kind in kinds}

        self.better, self.margin = tallies(), tallies()

    def add(self, kind: str, place: Place, margin: Tensor) -> None:
        """Count one pair of each row, `[B]` nats; NaN where there is none."""
        index = torch.full((len(margin), 1), self.places.index(place))
        better = torch.where(margin.isnan(), torch.nan, (margin.sign() + 1) / 2)
        self.better[kind].add(better[:, None], index, fresh=False)
        self.margin[kind].add(margin[:, None], index, fresh=False)

    def as_json(self) -> dict[str, Any]:
        """All that was counted, by file, fit for JSON: what comparisons are made of later."""
        tallies = {"better": self.better, "margin": self.margin}
        held = {n: {kind: t.as_json() for kind, t in each.items()} for n, each in tallies.items()}
        return {"places": self.places, **held}

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> Pairs:
        made = cls((), held["places"], 0)
        made.better, made.margin = (
            {kind: Tally.from_json(tally) for kind, tally in held[name].items()}
            for name in ("better", "margin")
        )
        return made

    def result(self) -> list[dict[str, Any]]:
        """For each place (`length` and `filler`) and `kind` the `share` of pairs with the right one
        more likely, `margin` in nats, both `[value, low, high]` (see `bootstrap`), and `pairs`, how
        many there were."""
        return [
            {
                **place._asdict(),
                "kind": kind,
                "share": _mean(better, index),
                "margin": _mean(self.margin[kind], index),
                "pairs": int(better.counts[:, index].sum()),
            }
            for index, place in enumerate(self.places)
            for kind, better in self.better.items()
        ]


def pairs(
    lm: LMModel,
    source: Conversations,
    lengths: Sequence[int],
    *,
    rows: int = 8,
    fillers: Sequence[int],
    seed: int = 0,
) -> Pairs:
    """Compare likelihoods after so many frames of each conversation.

    Conversations are heard once; at each length the model's state is forked for every continuation.
    Questions are those of `TestbedTeller`, of other data those of `RecordedTeller`.

    Args:
        lm: the patched model, as in `Forcing`.
        lengths: in frames, rising; questions are at the last ends of pieces up to each.
        rows: conversations, at least 2; of recordings at least 3.
        fillers: frames before a question, each of them for the same conversations.

    Raises:
        ValueError: rows are too few, lengths or fillers are none or do not rise, a length is below
            one piece of 256 frames, or the source's conversations end before the last of them.
        RuntimeError: what the model makes of a code is not finite.
    """
    rows = whole_number("rows", rows, 2)
    fillers = [whole_number("fillers", frames, 0) for frames in fillers]
    if not fillers or sorted(set(fillers)) != fillers:
        raise ValueError(f"fillers must rise, at least one number of frames, got {fillers}")
    if not lengths or sorted(set(lengths)) != list(lengths) or lengths[0] < SEGMENT:
        raise ValueError(f"lengths must rise from {SEGMENT} frames on, got {list(lengths)}")
    forcing, found, teller = Forcing(lm, rows), None, None
    start, last = 0, lengths[-1]
    for piece in source.pieces(rows, last + SEGMENT, seed):
        if found is None or teller is None:
            teller = _teller(piece, rows, seed)
            places = [Place(length, filler) for length in lengths for filler in fillers]
            found = Pairs(teller.kinds, places, rows)
        for place in found.places:
            if start and 0 <= place.length - start < teller.places * SEGMENT:
                for kind, margin in _margins(forcing, teller, piece.codes, place.filler):
                    found.add(kind, place, margin)
        if start + piece.codes.shape[2] > last:
            return found
        teller.hear(piece.codes)
        forcing.feed(piece.codes)
        start += piece.codes.shape[2]
    raise ValueError(
        f"lengths must be below those of the conversations of {source.name}, which end after "
        f"{start} frames, got {list(lengths)}"
    )


def _teller(piece: Piece, rows: int, seed: int) -> Teller:
    return (
        TestbedTeller(rows, random.Random(f"pairs {seed}")) if piece.marks else RecordedTeller(rows)
    )


def _margins(
    forcing: Forcing, teller: Teller, ahead: Tensor, filler: int
) -> Iterator[tuple[str, Tensor]]:
    """By how much the right continuations of a place are more likely, in nats, `[B]`."""
    here = forcing.fork()
    if filler:
        here.feed(teller.filler(filler))
    good, right = None, None
    for question in teller.questions(ahead):
        if right is None or good is not question.good:
            good, right = question.good, here.fork().feed(question.good)
        for kind, (codes, there) in question.bad.items():
            wrong = here.fork().feed(codes)
            both = right.there & wrong.there
            margin = (wrong.nats.double() - right.nats.double()).masked_fill(~both, 0).sum((1, 2))
            yield kind, margin.masked_fill(~(there & both.any(2).any(1)), torch.nan)


def _mean(tally: Tally, index: int) -> list[float | None]:
    sums, counts = tally.sums[:, index], tally.counts[:, index]
    return bootstrap(lambda w: ratio(w @ sums, w @ counts), tally.files).row()
