"""Recall: whether a fact is answered right, against its age, the load and how often it changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ttt_cache.checks import whole_number
from ttt_cache.testbed.stream import NONE
from ttt_cache.testbed.vocabulary import SHADES

from .forced import Scores
from .intervals import Interval, bootstrap
from .tally import Tally, octave, octave_edges, padded, ratio

NEAR, FAR = 0, 1  # bins of `near and far` and of `voice`
VOICE = 2  # Moshi's second codebook: its place in `Scores.choices`


class Recall:
    """Shares of right answers, by file.

    An answer is right if the model's most likely text token is the right one. *Near* is a fact of
    an age of at most `recent` frames: every window has it. *Far* is one of at least
    `recent + chunk`: it is beyond each layer's window. That alone does not make it out of reach:
    of two stacked layers the upper sees outputs of the lower, which saw a window's frames before
    them, so n windows on top of each other reach n times as far. How much that gives without a
    memory is what the window-only control shows; a memory is worth what it has beyond that.

    Args:
        recent, chunk: of the cache that is looked at. A comparison needs the same in all arms.

    Attributes:
        tallies: `facts` and `voice` near and far, `age`; of far facts `load` (facts known),
            `rewritten` (values that the key had before) and `position` in the conversation.
    """

    NAMES = "facts", "voice", "age", "load", "rewritten", "position"

    def __init__(self, recent: int, chunk: int) -> None:
        self.recent = whole_number("recent", recent, 0)
        self.chunk = whole_number("chunk", chunk, 1)
        self.tallies = {name: Tally() for name in self.NAMES}

    @property
    def files(self) -> int:
        return self.tallies["facts"].files

    def add(self, scores: Scores, marks: Mapping[str, Tensor]) -> None:
        """Count the next frames; those from `start` 0 on are of new conversations.

        Args:
            marks: as in `Piece`, with all that the testbed knows.

        Raises:
            ValueError: marks are missing: nobody knows which answers would be right.
        """
        if missing := {"answer", "age", "load", "rewritten", "voice"} - marks.keys():
            raise ValueError(f"marks must tell {', '.join(sorted(missing))} to measure recall")
        answer, age, voice = marks["answer"], marks["age"], marks["voice"]
        near, far = age <= self.recent, age >= self.recent + self.chunk
        asked, again = answer != NONE, voice != NONE
        right = scores.choices[:, 0] == answer
        kept = scores.choices[:, VOICE].div(SHADES, rounding_mode="floor") == voice
        predicted = scores.choices[:, VOICE] >= 0
        positions = torch.arange(scores.start, scores.start + age.shape[1]).expand_as(age)
        counted = {
            "facts": (right, asked & (near | far), far.long()),
            "voice": (kept, again & predicted & (near | far), far.long()),
            "age": (right, asked, octave(age)),
            "load": (right, asked & far, marks["load"]),
            "rewritten": (right, asked & far, octave(marks["rewritten"])),
            "position": (right, asked & far, octave(positions)),
        }
        for name, (values, where, bins) in counted.items():
            values = values.float().masked_fill(~where, torch.nan)
            self.tallies[name].add(values, bins, fresh=scores.start == 0)

    def as_json(self) -> dict[str, Any]:
        """All that was counted, by file, fit for JSON: what comparisons are made of later."""
        held = {name: tally.as_json() for name, tally in self.tallies.items()}
        return {"recent": self.recent, "chunk": self.chunk, **held}

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> Recall:
        made = cls(held["recent"], held["chunk"])
        made.tallies = {name: Tally.from_json(held[name]) for name in cls.NAMES}
        return made

    def share(self, name: str = "facts", which: int = FAR) -> Interval:
        """The share of right ones in one bin of a tally."""
        return bootstrap(lambda w: _shares(self.tallies[name], which + 1, w)[:, which], self.files)

    def result(self) -> dict[str, Any]:
        """What was found, fit for JSON.

        Returns:
            `files`; `far`, `near`, `voice_far` and `voice_near`: `share` (`[value, low, high]`, see
            `bootstrap`) and `asked`, the number of questions; and `by_age`, `by_load`,
            `by_rewritten` and `by_position`, lists of the same with `begin` and `end` of each bin.
        """
        found: dict[str, Any] = {"files": self.files}
        for name, prefix in (("facts", ""), ("voice", "voice_")):
            near, far = self._bins(name, 2)
            found |= {f"{prefix}far": far, f"{prefix}near": near}
        for name in ("age", "load", "rewritten", "position"):
            bins = self.tallies[name].bins
            edges = torch.arange(bins + 1) if name == "load" else octave_edges(bins)
            found[f"by_{name}"] = [
                {"begin": begin, "end": end, **figures}
                for begin, end, figures in zip(
                    edges[:-1].tolist(), edges[1:].tolist(), self._bins(name, bins), strict=True
                )
                if figures["asked"]
            ]
        return found

    def _bins(self, name: str, bins: int) -> list[dict[str, Any]]:
        tally = self.tallies[name]
        shares = bootstrap(lambda w: _shares(tally, bins, w), self.files).rows()
        asked = _counts(tally, bins).sum(0).long().tolist()
        return [{"share": share, "asked": n} for share, n in zip(shares, asked, strict=True)]


def relative(arm: Recall, other: Recall, name: str = "facts", which: int = FAR) -> Interval:
    """An arm's share of right answers over another arm's; paired over files.

    Args:
        name, which: a tally and its bin; far facts by default.

    Raises:
        ValueError: the arms are of other conversations, or count others as far.
    """
    return _compared(arm, other, name, which, torch.div)


def apart_by(arm: Recall, other: Recall, name: str = "facts", which: int = FAR) -> Interval:
    """An arm's share of right answers less another arm's; otherwise as `relative`."""
    return _compared(arm, other, name, which, torch.sub)


def _compared(
    arm: Recall,
    other: Recall,
    name: str,
    which: int,
    how: Callable[[Tensor, Tensor], Tensor],
) -> Interval:
    mine, theirs = arm.tallies[name], other.tallies[name]
    counts = [_counts(tally, which + 1)[:, which] for tally in (mine, theirs)]
    if (arm.recent, arm.chunk) != (other.recent, other.chunk) or not torch.equal(*counts):
        raise ValueError(
            "arms must be of the same conversations, recent and chunk, got "
            f"{arm.files} and {other.files} files, recent {arm.recent} and {other.recent}, "
            f"chunk {arm.chunk} and {other.chunk}"
        )

    def shares(weights: Tensor) -> Tensor:
        of_arm, of_other = (_shares(t, which + 1, weights)[:, which] for t in (mine, theirs))
        return how(of_arm, of_other)

    return bootstrap(shares, arm.files)


def _shares(tally: Tally, bins: int, weights: Tensor) -> Tensor:
    """Of each draw of files and bin, `[n, bins]`."""
    return ratio(weights @ padded(tally.sums, tally.files, bins), weights @ _counts(tally, bins))


def _counts(tally: Tally, bins: int) -> Tensor:
    return padded(tally.counts, tally.files, bins)
