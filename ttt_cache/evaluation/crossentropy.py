"""Cross-entropy by position in the conversation, of text, first codebook and the rest apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .forced import Scores
from .intervals import Interval, bootstrap
from .positions import groups_of, has_jump, over, sides
from .tally import Tally, fine, fine_edges, ratio

MEASURES = "text", "first", "rest", "total"  # as in `Scores`


class CrossEntropy:
    """Nats per frame, by file and position.

    Memory grows with the logarithm of the length: positions have bins of their own up to 64, from
    there on 32 to an octave.

    Attributes:
        frames: length of the longest conversation.
        tallies: by measure: `text`, `first`, `rest` and `total`, which is nats of the whole frame.
    """

    def __init__(self) -> None:
        self.frames = 0
        self.tallies = {measure: Tally() for measure in MEASURES}

    @property
    def files(self) -> int:
        return self.tallies["total"].files

    def add(self, scores: Scores) -> None:
        """Count the next frames; those from `start` 0 on are of new conversations."""
        rows, length = scores.text.shape
        positions = torch.arange(scores.start, scores.start + length)
        bins = fine(positions).expand(rows, -1)
        for measure, tally in self.tallies.items():
            tally.add(getattr(scores, measure), bins, fresh=scores.start == 0)
        self.frames = max(self.frames, scores.start + length)

    def as_json(self) -> dict[str, Any]:
        """All that was counted, by file, fit for JSON: what comparisons are made of later."""
        held = {measure: tally.as_json() for measure, tally in self.tallies.items()}
        return {"frames": self.frames, **held}

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> CrossEntropy:
        made = cls()
        made.frames = held["frames"]
        made.tallies = {measure: Tally.from_json(held[measure]) for measure in MEASURES}
        return made

    def mean(self, begin: int = 0, end: int | None = None, measure: str = "total") -> Interval:
        """Nats per frame from frame `begin` to before `end`, widened to the whole bins there.

        Raises:
            ValueError: there is no frame from `begin` to `end`.
        """
        chosen = over(self.frames, begin, end)
        return bootstrap(lambda w: _mean(self.tallies[measure], chosen, w), self.files)

    def result(self, window: int | None = None) -> dict[str, Any]:
        """What was found, fit for JSON; figures are `[value, low, high]`, see `bootstrap`.

        Args:
            window: frames that a model sees exactly; `None` leaves out `jump` and `slope`.

        Returns:
            `files`, `frames`, `positions` (`[begin, end]` of each bin), and by measure `mean` and
            `by_position`, nats per frame, with `jump`, the relative change of it from just before
            the window's end to just beyond it, and `slope`, the nats by which it changes from
            there on with every doubling of the position.
        """
        groups = groups_of(self.frames)
        found: dict[str, Any] = {
            "files": self.files,
            "frames": self.frames,
            "positions": [list(group) for group in groups],
        }
        for measure, tally in self.tallies.items():
            by_position = bootstrap(lambda w, t=tally: _by_group(t, groups, w), self.files)
            found[measure] = {
                "mean": self.mean(measure=measure).row(),
                "by_position": by_position.rows(),
            }
            if window is not None and 0 < window < self.frames:
                found[measure]["slope"] = slope(self, window, measure).row()
            if window is not None and has_jump(self.frames, window):
                own = bootstrap(lambda w, t=tally: self._jump(t, window, w), self.files)
                found[measure]["jump"] = own.row()
        return found

    def _jump(self, tally: Tally, window: int, weights: Tensor) -> Tensor:
        return _ratio(tally, *sides(self.frames, window), weights) - 1


def excess(
    arm: CrossEntropy,
    other: CrossEntropy,
    begin: int = 0,
    end: int | None = None,
    measure: str = "total",
) -> Interval:
    """How much more nats an arm has than another, relative to the other; paired over files.

    Args:
        begin, end: frames from the first to before the last, widened to the whole bins there; all
            that both have by default.

    Raises:
        ValueError: the arms are of other conversations, or there is no frame from `begin` to `end`.
    """
    frames = common(arm, other)
    chosen = over(frames, begin, end)
    return bootstrap(lambda w: _excess(arm, other, measure, chosen, w), arm.files)


def drift(
    arm: CrossEntropy,
    early: tuple[int, int],
    late: tuple[int, int],
    other: CrossEntropy | None = None,
    measure: str = "total",
) -> Interval:
    """Relative change of nats from some frames to later ones; paired over files.

    Args:
        early, late: from the first frame to before the last, widened to the whole bins there.
        other: an arm whose own change, of what is talked about, is taken off.

    Raises:
        ValueError: there are no such frames, or the arms are of other conversations.
    """
    frames = arm.frames if other is None else common(arm, other)
    first, last = over(frames, *early), over(frames, *late)

    def beside(weights: Tensor) -> Tensor:
        change = _ratio(arm.tallies[measure], first, last, weights)
        if other is not None:
            change = change / _ratio(other.tallies[measure], first, last, weights)
        return change - 1

    return bootstrap(beside, arm.files)


def jump(arm: CrossEntropy, full: CrossEntropy, window: int, measure: str = "total") -> Interval:
    """By how much an arm gets worse where its first frames leave the window.

    The relative excess over the full-context arm in the frames just beyond the window's end, less
    that in the frames just before it; paired over files, so that what the conversations are about
    does not count. Just beyond and before are as many frames as the window has, at most 128 or an
    eighth of them.

    Args:
        window: frames that the arm sees exactly; the first frame whose prediction may lack one is
            number `window`, from 0.

    Raises:
        ValueError: the arms are of other conversations, these end within the window, or no bin is
            wholly on one of its sides: bins are not widened here, as they would mix both.
    """
    frames = common(arm, full)
    if not has_jump(frames, window):
        raise ValueError(
            f"window must end within {frames} frames, a bin before and behind it; got {window}"
        )
    before, after = sides(frames, window)
    return bootstrap(
        lambda w: _excess(arm, full, measure, after, w) - _excess(arm, full, measure, before, w),
        arm.files,
    )


def slope(arm: CrossEntropy, begin: int, measure: str = "total") -> Interval:
    """Nats per frame that an arm gains with every doubling of the position, from `begin` on.

    The least-squares line through the bins, weighted by their frames; the first is the one that
    `begin` is in.

    Raises:
        ValueError: the conversations end before `begin`.
    """
    tally, chosen = arm.tallies[measure], over(arm.frames, begin, None)
    edges = fine_edges(tally.bins).double()
    octaves = ((edges[:-1] + edges[1:] - 1) / 2).clamp_min(1).log2()[chosen]

    def line(weights: Tensor) -> Tensor:
        sums, counts = weights @ tally.sums[:, chosen], weights @ tally.counts[:, chosen]
        total = counts.sum(1, keepdim=True)
        x = octaves - (counts * octaves).sum(1, keepdim=True) / total
        return (x * sums).sum(1) / (counts * x.square()).sum(1)

    return bootstrap(line, arm.files)


def compared(arm: CrossEntropy, full: CrossEntropy, window: int) -> dict[str, Any]:
    """An arm beside another, both on the same conversations, fit for JSON.

    Returns:
        `positions`, and by measure `excess` of all frames that both have, `by_position`, likewise,
        and `jump` at the window, if conversations go beyond it.
    """
    frames = common(arm, full)
    groups = groups_of(frames)
    found: dict[str, Any] = {"frames": frames, "positions": [list(group) for group in groups]}
    for measure in MEASURES:

        def by_position(weights: Tensor, measure: str = measure) -> Tensor:
            of_arm, of_full = (_by_group(a.tallies[measure], groups, weights) for a in (arm, full))
            return of_arm / of_full - 1

        found[measure] = {
            "excess": excess(arm, full, measure=measure).row(),
            "by_position": bootstrap(by_position, arm.files).rows(),
        }
        if has_jump(frames, window):
            found[measure]["jump"] = jump(arm, full, window, measure).row()
    return found


def common(arm: CrossEntropy, other: CrossEntropy) -> int:
    """The frames that two arms have both seen, as far as bins tell.

    Raises:
        ValueError: they are of other conversations.
    """
    frames = min(arm.frames, other.frames)
    if arm.frames != other.frames:
        # The last bin of the shorter one is cut, and its delayed codes are not predicted.
        frames = int(fine_edges(int(fine(torch.tensor(max(frames - 1, 0)))) + 1)[-2])
    whole = over(frames, 0, None)
    mine, theirs = (a.tallies["text"].counts[:, whole] for a in (arm, other))
    if mine.shape != theirs.shape or not torch.equal(mine, theirs):
        raise ValueError(
            f"arms must be of the same conversations, got {arm.files} files of up to {arm.frames} "
            f"frames and {other.files} of up to {other.frames}"
        )
    return frames


def _by_group(tally: Tally, groups: list[tuple[int, int]], weights: Tensor) -> Tensor:
    frames = groups[-1][1]
    return torch.stack([_mean(tally, over(frames, *g), weights) for g in groups], dim=1)


def _mean(tally: Tally, bins: slice, weights: Tensor) -> Tensor:
    """Of each draw of files, `[n]`."""
    sums, counts = tally.sums[:, bins].sum(1), tally.counts[:, bins].sum(1)
    return ratio(weights @ sums, weights @ counts)


def _ratio(tally: Tally, before: slice, after: slice, weights: Tensor) -> Tensor:
    """Nats in later bins over those in earlier ones, of each draw of files, `[n]`."""
    return _mean(tally, after, weights) / _mean(tally, before, weights)


def _excess(
    arm: CrossEntropy, other: CrossEntropy, measure: str, bins: slice, weights: Tensor
) -> Tensor:
    mine, theirs = (_mean(a.tallies[measure], bins, weights) for a in (arm, other))
    return mine / theirs - 1
