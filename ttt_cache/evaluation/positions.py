"""Which bins of positions a stretch of a conversation is made of; bins as in `tally.fine`."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .tally import fine, fine_edges

# Frames on each side of a window, at most, that are "just beyond" and "just before" it; of a very
# wide one the share that holds two bins.
SPAN, SPAN_SHARE = 128, 1 / 8


def has_jump(frames: int, window: int) -> bool:
    """Whether conversations of so many frames tell what happens at the end of a window."""
    return 0 < window < frames and all(side.start < side.stop for side in sides(frames, window))


def _edges(frames: int) -> Tensor:
    """Where the bins of so many frames begin, and the last one, which may be cut, would end."""
    return fine_edges(int(fine(torch.tensor(frames - 1))) + 1 if frames else 0)


def over(frames: int, begin: int, end: int | None) -> slice:
    """The bins of which a part is within frames from `begin` to before `end`.

    Far out a bin may hold more frames than are asked for: 2,048 of them from 65,536 on.
    """
    stop = frames if end is None else min(end, frames)
    if not 0 <= begin < stop:
        raise ValueError(f"frames must be among the {frames} heard, got {begin} to before {end}")
    edges = _edges(frames)
    return slice(int((edges[1:] <= begin).sum()), int((edges[:-1] < stop).sum()))


def sides(frames: int, window: int) -> tuple[slice, slice]:
    """The bins just before and just beyond the end of a window, none where it is not straddled."""
    span = min(window, max(SPAN, round(SPAN_SHARE * window)))
    return _inside(frames, window - span, window), _inside(frames, window, window + span)


def _inside(frames: int, begin: int, end: int) -> slice:
    """The bins that are wholly within frames from `begin` to before `end`; the last may be cut."""
    edges = _edges(frames)
    last = len(edges) - 1 if end >= frames else int((edges[1:] <= end).sum())
    return slice(int((edges[:-1] < begin).sum()), last)


def groups_of(frames: int) -> list[tuple[int, int]]:
    """Bins to show: 8 frames up to 32, then four to an octave."""
    edges = [0, 8, 16, 24]
    while edges[-1] < frames:
        octave = 2 ** (len(edges) // 4 + 4)
        edges += [octave + quarter * octave // 4 for quarter in range(4)]
    ends = [edge for edge in edges if edge < frames] + [frames]
    return list(pairwise(ends))
