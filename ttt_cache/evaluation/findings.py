"""Results of points, read back: figures with intervals, and comparisons between points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .crossentropy import MEASURES, CrossEntropy, common, compared, excess, jump, slope
from .measures import Span
from .pairs import Pairs
from .positions import has_jump
from .protocol import Found, Point
from .recall import FAR, NEAR, Recall

Row = list[float | None]  # value, low and high
NOTHING: Row = [None, None, None]
HEARD = "listen", "early"  # measures whose counts are shown by what is made of them


@dataclass(frozen=True)
class Finding:
    """What was found of one point.

    Attributes:
        crossentropy: by position; `None` if nothing was heard.
        recalls: by span; empty for data without marks.
        results: of all measures, as they are on disk.
    """

    point: Point
    crossentropy: CrossEntropy | None
    recalls: dict[str, Recall]
    results: dict[str, Any]

    @property
    def name(self) -> str:
        return self.point.name

    @property
    def early(self) -> Finding:
        """The same of many short conversations, where it was measured; else this one."""
        return _finding(self.point, self.results, "early") if "early" in self.results else self

    def nats(self, span: Span, measure: str = "total") -> Row:
        """Nats per frame in a span."""
        if self.crossentropy is None:
            return NOTHING
        return self.crossentropy.mean(span.begin, span.end, measure).row()

    def share(self, span: Span, name: str = "facts", which: int = FAR) -> Row:
        """The share of right answers in a span."""
        recall = self.recalls.get(span.name)
        return NOTHING if recall is None else recall.share(name, which).row()

    def excess(self, other: Finding, span: Span, measure: str = "total") -> Row:
        """How much more nats than another point, relative to it, paired over files."""
        if self.crossentropy is None or other.crossentropy is None:
            return NOTHING
        pair = self.crossentropy, other.crossentropy
        return excess(*pair, span.begin, span.end, measure).row()

    def asked(self, span: Span, name: str = "facts", which: int = FAR) -> int:
        """How many questions a share of `share` is of."""
        recall = self.recalls.get(span.name)
        if recall is None or recall.tallies[name].bins <= which:
            return 0
        return int(recall.tallies[name].counts[:, which].sum())

    def jump(self, other: Finding | None, window: int, measure: str = "total") -> Row:
        """By how much its excess over another point grows where frames leave the window."""
        mine, theirs = self.crossentropy, other.crossentropy if other else None
        if mine is None or theirs is None:
            return NOTHING
        if not has_jump(common(mine, theirs), window):
            return NOTHING
        return jump(mine, theirs, window, measure).row()

    def slope(self, window: int, measure: str) -> Row:
        """Nats that it gains with every doubling of the position beyond the window."""
        heard = self.crossentropy
        if heard is None or not 0 < window < heard.frames:
            return NOTHING
        return slope(heard, window, measure).row()

    def as_json(self, spans: Sequence[Span], other: Finding | None, window: int) -> dict[str, Any]:
        """All figures, `[value, low, high]` each.

        Args:
            other: what cross-entropy is compared with.
            window: frames, where its jump is looked for and its slope begins.
        """
        heard, theirs = self.crossentropy, other.crossentropy if other else None
        return {
            "series": self.point.series or self.point.arm.name,
            "x": self.point.x,
            "settings": dict(self.point.arm.settings),
            "recall": {
                span.name: {
                    "far": self.share(span),
                    "near": self.share(span, which=NEAR),
                    "voice": self.share(span, "voice"),
                }
                for span in spans
                if span.name in self.recalls
            },
            "nats": {
                span.name: {measure: self.nats(span, measure) for measure in MEASURES}
                for span in spans
                if self.crossentropy is not None
            },
            "excess": {
                span.name: self.excess(other, span)
                for span in spans
                if other is not None and self.crossentropy is not None
            },
            "by_position": None if heard is None else heard.result(window),
            "beside": None if heard is None or theirs is None else compared(heard, theirs, window),
            "recall_by": {name: recall.result() for name, recall in self.recalls.items()},
        } | {name: _shown(name, held) for name, held in self.results.items() if name not in HEARD}


def read(points: Sequence[Point], found: Found) -> dict[str, Finding]:
    """The findings of all points that have results, by name."""
    return {
        point.name: _finding(point, found[point.name]) for point in points if point.name in found
    }


def _finding(point: Point, results: Mapping[str, Any], measure: str = "listen") -> Finding:
    heard = results.get(measure)
    if heard is None:
        return Finding(point, None, {}, dict(results))
    recalls = {name: Recall.from_json(held) for name, held in heard["recall"].items()}
    crossentropy = CrossEntropy.from_json(heard["crossentropy"])
    return Finding(point, crossentropy, recalls, dict(results))


def _shown(measure: str, held: Any) -> Any:
    """A result with its figures, where what is kept are the counts that they are made of."""
    return Pairs.from_json(held).result() if measure == "pairs" else held
