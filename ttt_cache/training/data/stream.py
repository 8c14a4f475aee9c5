"""Batches of consecutive segments, every row walking through its own sessions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttt_cache.checks import whole_number

from .facts import LMFacts
from .sessions import SessionSource


@dataclass(frozen=True)
class Batch:
    """One segment for each row of this process.

    Attributes:
        codes: int64 `[B, K, frames + 1]`, delayed once per session: column t is the model's input
            at frame t, column t + 1 its target. The last column of a segment is the first of the
            next. Past the end of a session all is the model's zero token.
        fresh: bool `[B]`, the rows that begin a session: what they carry must be reset.
    """

    codes: Tensor
    fresh: Tensor


@dataclass
class _Position:
    """Where a row is: in which of its sessions, and at which frame of it."""

    session: int = 0
    frame: int = 0


class SegmentStream:
    """An endless stream of segments in file order.

    The sessions of epoch after epoch make one endless line. Row r of `total_rows` takes number r,
    r + total_rows, r + 2 total_rows and so on of it, each from its first frame to its last. So what
    a row sees depends on `total_rows`, not on how the rows are spread over processes.

    Args:
        sessions: where the codes come from; one session per row is in memory at a time.
        facts: of the model that is trained.
        total_rows: rows of the batch over all processes.
        rows: those of this process; `None` means all.
        seed: of the order in which the sessions come.
        shuffle: draw that order anew for every epoch; otherwise it is file order.

    Raises:
        ValueError: there is no session, or `rows` is not within `range(total_rows)`.
    """

    def __init__(
        self,
        sessions: SessionSource,
        facts: LMFacts,
        total_rows: int,
        rows: range | None = None,
        seed: int = 0,
        shuffle: bool = False,
    ) -> None:
        self.sessions = sessions
        self.facts = facts
        self.total_rows = whole_number("total_rows", total_rows, 1)
        self.rows = range(self.total_rows) if rows is None else rows
        self.seed = whole_number("seed", seed, 0)
        self.shuffle = shuffle
        self._frames = list(sessions.frames)
        if not self._frames or min(self._frames) < 1:
            raise ValueError("sessions must hold at least one session, and none of 0 frames")
        if not self.rows or not set(self.rows) <= set(range(self.total_rows)):
            raise ValueError(f"rows must be within range({self.total_rows}), got {self.rows}")
        lengths = hashlib.sha256(repr(self._frames).encode()).hexdigest()
        self._identity = {
            "sessions": len(self._frames),
            "session_lengths": lengths[:16],
            "total_rows": self.total_rows,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }
        # All rows, also those of other processes: any process can write the whole state.
        self._at = [_Position() for _ in range(self.total_rows)]
        self._loaded: dict[int, tuple[int, Tensor]] = {}
        self._order: tuple[int, np.ndarray] | None = None

    def next_batch(self, frames: int) -> Batch:
        """The next segment of every row of this process; all processes must ask for the same.

        Args:
            frames: length of the segment; may change from call to call.
        """
        frames = whole_number("frames", frames, 1)
        codes = torch.stack([self._segment(row, frames) for row in self.rows])
        fresh = torch.tensor([self._at[row].frame == 0 for row in self.rows])
        for row in range(self.total_rows):
            self._advance(row, frames)
        return Batch(codes, fresh)

    def state_dict(self) -> dict[str, Any]:
        """The position of all `total_rows` rows, and what it belongs to; fit for JSON."""
        return {**self._identity, "rows": [[at.session, at.frame] for at in self._at]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, with any number of processes.

        Raises:
            ValueError: it was taken with other sessions, rows, seed or shuffle.
        """
        for name, ours in self._identity.items():
            if state.get(name) != ours:
                raise ValueError(
                    f"the stream's state was saved with {name} {state.get(name)!r}, here it is "
                    f"{ours!r}: go on with the same data and settings, or start anew"
                )
        self._at = [_Position(session, frame) for session, frame in state["rows"]]

    def _segment(self, row: int, frames: int) -> Tensor:
        """The next segment of a row, int64 `[K, frames + 1]`."""
        begin = self._at[row].frame
        part = self._delayed(row)[:, begin : begin + frames + 1]
        segment = torch.full((part.shape[0], frames + 1), self.facts.zero, dtype=torch.int64)
        segment[:, : part.shape[1]] = part
        return segment

    def _delayed(self, row: int) -> Tensor:
        """The whole session that a row is in, delayed, `[K, T + 1]`."""
        session = self._at[row].session
        if row not in self._loaded or self._loaded[row][0] != session:
            codes = self.sessions.codes(self._index(row, session))
            self._loaded[row] = session, self.facts.delayed(codes)
        return self._loaded[row][1]

    def _advance(self, row: int, frames: int) -> None:
        at = self._at[row]
        at.frame += frames
        if at.frame >= self._frames[self._index(row, at.session)]:
            at.session, at.frame = at.session + 1, 0

    def _index(self, row: int, session: int) -> int:
        """Which session of the data is the n-th of a row."""
        epoch, place = divmod(row + session * self.total_rows, len(self._frames))
        return int(self._permutation(epoch)[place])

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            count = len(self._frames)
            order = np.arange(count)
            if self.shuffle:
                order = np.random.default_rng((self.seed, epoch)).permutation(count)
            self._order = epoch, order
        return self._order[1]
