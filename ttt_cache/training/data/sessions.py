"""Recordings, put together to long sessions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from ttt_cache.checks import whole_number

from .shards import TokenCache


class SessionSource(Protocol):
    """Anything that holds sessions and loads one at a time."""

    @property
    def frames(self) -> Sequence[int]:
        """The length of each session, at least 1."""
        ...

    def codes(self, session: int) -> Tensor:
        """The codes of a session, not delayed, of an integer dtype, `[K, T]`."""
        ...


class Sessions:
    """The recordings of a cache in file order, joined to sessions of a length.

    Args:
        cache: tokenised recordings.
        session_frames: frames that a session must have at least; 0 or `None` makes every recording
            its own session. What is left at the end joins the last session, so a session is only
            shorter if all recordings together are.
    """

    def __init__(self, cache: TokenCache, session_frames: int | None = None) -> None:
        self.cache = cache
        least = whole_number("session_frames", session_frames or 0, 0)
        self.recordings = join(cache.frames, least)
        self.frames = [sum(cache.frames[i] for i in group) for group in self.recordings]

    def codes(self, session: int) -> Tensor:
        """Load the codes of a session from the disk, int32 `[K, T]`, not delayed."""
        group = self.recordings[session]
        return torch.cat(list(self.cache.codes(group)), dim=1)


def join(frames: Sequence[int], least: int) -> list[range]:
    """Consecutive recordings, grouped so that every group has `least` frames if that can be."""
    ends = [0, *accumulate(frames)]
    groups: list[range] = []
    begin = 0
    for end in range(1, len(ends)):
        if ends[end] - ends[begin] >= least:
            groups.append(range(begin, end))
            begin = end
    if begin < len(frames):  # too short for a session of its own
        begin = groups.pop().start if groups else 0
        groups.append(range(begin, len(frames)))
    return groups
