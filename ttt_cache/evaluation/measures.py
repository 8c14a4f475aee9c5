"""What is measured of an arm: each measure gives plain values that are kept on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from moshi.models.lm import LMModel
from torch import Tensor

from ttt_cache.patch import Patch

from .cost import cost
from .crossentropy import CrossEntropy
from .forced import Scores, forced
from .freerun import freerun
from .mass import attention_mass
from .pairs import pairs
from .recall import Recall
from .source import Conversations


class Run(NamedTuple):
    """One arm at work.

    Attributes:
        lm: patched as the arm says.
        source: what it hears.
        seed: of conversations and of sampling.
    """

    lm: LMModel
    handle: Patch
    source: Conversations
    seed: int


class Measure(Protocol):
    """A dataclass: its fields, with its class's name, are all that its result depends on beside
    the arm, the source and the seed."""

    @property
    def name(self) -> str:
        """Its place in the results of a point."""
        ...

    def __call__(self, run: Run) -> dict[str, Any]: ...


class Span(NamedTuple):
    """Frames of a conversation, from the first to before the last."""

    name: str
    begin: int
    end: int


@dataclass(frozen=True)
class Listen:
    """Teacher-forced conversations: cross-entropy, and recall where the data has marks.

    Args:
        rows, frames: conversations and their length.
        recent, chunk: a fact is near up to `recent` frames and far from `recent + chunk` on.
        spans: where recall is counted apart.
    """

    rows: int
    frames: int
    recent: int
    chunk: int
    spans: tuple[Span, ...]

    name = "listen"

    def __call__(self, run: Run) -> dict[str, Any]:
        heard = CrossEntropy()
        recalls: dict[str, Recall] = {}
        pieces = run.source.pieces(self.rows, self.frames, run.seed)
        for scores, piece in forced(run.lm, pieces, self.rows):
            heard.add(scores)
            for span in self.spans if piece.marks else ():
                recall = recalls.setdefault(span.name, Recall(self.recent, self.chunk))
                part = _within(span, scores, piece.marks)
                if part is not None:
                    recall.add(*part)
        return {
            "crossentropy": heard.as_json(),
            "recall": {name: recall.as_json() for name, recall in recalls.items()},
        }


@dataclass(frozen=True)
class Early(Listen):
    """The same of more conversations that are shorter: how they begin, with narrower intervals."""

    name = "early"


def _within(
    span: Span, scores: Scores, marks: dict[str, Tensor]
) -> tuple[Scores, dict[str, Tensor]] | None:
    """The frames that are in a span, counted from its beginning; `None` if there are none."""
    first = max(span.begin - scores.start, 0)
    last = min(span.end - scores.start, scores.text.shape[1])
    if first >= last:
        return None
    cut = (tensor[..., first:last] for tensor in scores[1:])
    shifted = Scores(scores.start + first - span.begin, *cut)
    return shifted, {name: mark[:, first:last] for name, mark in marks.items()}


@dataclass(frozen=True)
class Speak:
    """Moshi speaks for itself, sampling: what it says over time, its state and its steps."""

    rows: int
    frames: int

    name = "speak"

    def __call__(self, run: Run) -> dict[str, Any]:
        return freerun(run.lm, run.source, self.frames, run.seed, rows=self.rows)


@dataclass(frozen=True)
class Cost:
    """Bytes of one conversation's state, and the time of a step."""

    frames: int = 300

    name = "cost"

    def __call__(self, run: Run) -> dict[str, Any]:
        return cost(run.lm, frames=self.frames, seed=run.seed)


@dataclass(frozen=True)
class Mass:
    """Where attention goes, by layer and head, in teacher-forced conversations."""

    rows: int
    frames: int

    name = "mass"

    def __call__(self, run: Run) -> dict[str, Any]:
        return attention_mass(run.lm, run.source.pieces(self.rows, self.frames, run.seed))


@dataclass(frozen=True)
class Paired:
    """Likelihoods of right and wrong continuations, some frames behind what they are about."""

    rows: int
    lengths: tuple[int, ...]
    fillers: tuple[int, ...]

    name = "pairs"

    def __call__(self, run: Run) -> dict[str, Any]:
        given = {"rows": self.rows, "fillers": self.fillers, "seed": run.seed}
        return pairs(run.lm, run.source, self.lengths, **given).as_json()
