"""Conversations as rows of one batch: they join, leave, and are stepped when they have a frame.

It knows nothing of sockets or of time. All calls are made from one thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMGen
from torch import Tensor

from ..session import put_session, take_session
from ..session_identity import identity_of
from ..session_state import running

if TYPE_CHECKING:
    from ..session_file import Described

    Session = tuple[dict[str, Tensor], Described]


class FullError(RuntimeError):
    """No row is free."""


@dataclass
class Answer:
    """What a conversation is answered to one frame.

    Args:
        pcm: float32 `[frame_size]`.
        token: of the text.
    """

    pcm: np.ndarray
    token: int


class Engine:
    """One model, its rows, and who has which.

    A row that joins is reset. One that has no frame waits while others step: of its state only the
    slots of Moshi's rings are written to that its own next frame writes over.

    Args:
        gen: `support_out_of_sync=True`; not streaming yet.
        mimi: not streaming yet.
        rows: conversations at once, at least 1.

    Raises:
        ValueError: the model cannot be heard, or cannot speak, or `rows` is not at least 1.
    """

    def __init__(self, gen: LMGen, mimi: MimiModel, rows: int) -> None:
        _check(gen, mimi, rows)
        self.gen, self.mimi, self.rows = gen, mimi, rows
        self.device = gen.lm_model.device
        self.frame_size = int(mimi.sample_rate / mimi.frame_rate)
        self._free = list(reversed(range(rows)))
        self._ages = [0] * rows  # frames that a row has been given
        self._failed = False
        with torch.no_grad():
            mimi.streaming_forever(rows)
            gen.streaming_forever(rows)
        self._identity = identity_of(gen, mimi)  # weights do not change while they are served

    @property
    def free(self) -> int:
        """How many more conversations may join."""
        return len(self._free)

    @torch.no_grad()
    def join(self) -> int:
        """Begin a conversation; returns its row.

        Raises:
            FullError: all rows are taken.
        """
        if not self._free:
            raise FullError(f"all {self.rows} rows are taken")
        row = self._free.pop()
        mask = self._mask({row})
        self.gen.reset_streaming(mask)
        self.mimi.reset_streaming(mask)
        self._ages[row] = 0
        return row

    def resume(self, path: Path, session: Session) -> int:
        """Go on with a conversation that `read_session` read from `path`; returns its row.

        Raises:
            FullError: all rows are taken.
            ValueError: the session is of another model.
        """
        row = self.join()
        try:
            put_session(self.gen, path, *session, mimi=self.mimi, row=row, identity=self._identity)
        except BaseException:
            self.leave(row)
            raise
        state = self.gen._streaming_state
        assert state is not None
        self._ages[row] = int(state.offsets[row])
        return row

    def leave(self, row: int) -> None:
        """End a conversation; its row is free."""
        if row in self._free or not 0 <= row < self.rows:
            raise ValueError(f"row must be one that is taken, got {row}")
        self._free.append(row)

    def age(self, row: int) -> int:
        """Frames that a conversation has been given since it began."""
        return self._ages[row]

    def session(self, row: int) -> Session | None:
        """A conversation as it is now, for `write_session` to write while others go on.

        `None` once a step has failed, which leaves half a step in the rows.
        """
        if self._failed:
            return None
        tensors, described = take_session(self.gen, self.mimi, row, self._identity)
        if self.device.type == "cpu":  # where they may be those of the running state
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        return tensors, described

    @torch.no_grad()
    def step(self, frames: Mapping[int, np.ndarray]) -> dict[int, Answer | None]:
        """Give a frame to some rows, each of which takes exactly one step.

        Args:
            frames: float32 `[frame_size]` for each row.

        Returns:
            an answer for each of them; `None` as long as the model's delays leave nothing to say.
        """
        try:
            return self._step(frames)
        except BaseException:
            self._failed = True
            raise

    def _step(self, frames: Mapping[int, np.ndarray]) -> dict[int, Answer | None]:
        heard = torch.zeros(self.rows, 1, self.frame_size)
        for row, frame in frames.items():
            heard[row, 0] = torch.from_numpy(frame)
        active = self._mask(frames)
        self.mimi.set_exec_mask(active)
        codes = self.mimi.encode(heard.to(self.device))
        # A first frame lies in the model's past: Mimi pads it, and pads the second one again.
        if new := {row for row in frames if not self._ages[row]}:
            self.mimi.reset_streaming(self._mask(new))
        self.gen.set_exec_mask(active)
        tokens = self.gen.step(codes)
        assert tokens is not None, "support_out_of_sync"
        for row in frames:
            self._ages[row] += 1
        said = {row for row in frames if self._ages[row] > self.gen.max_delay}
        return dict.fromkeys(frames) | self._spoken(tokens, said)

    def _spoken(self, tokens: Tensor, said: set[int]) -> dict[int, Answer]:
        """Decode the rows that have something to say."""
        if not said:
            return {}
        self.mimi.set_exec_mask(self._mask(said))
        # Other rows have no tokens, which Mimi has no code words for.
        pcm = self.mimi.decode(tokens[:, 1:].clamp(min=0)).cpu()
        text = tokens[:, 0, 0].tolist()
        # Copies: an answer that waits for its client must not hold those of all rows.
        return {row: Answer(pcm[row, 0].numpy().copy(), text[row]) for row in said}

    def state_bytes(self) -> int:
        """Bytes that all rows hold together, taken or not."""
        held = running(self.gen, self.mimi).rows.values()
        return sum(part.tensor.nbytes for part in held)

    def warm_up(self) -> None:
        """Step an empty row until it speaks, so that the first client does not wait for kernels."""
        row = self.join()
        for _ in range(self.gen.max_delay + 4):
            self.step({row: np.zeros(self.frame_size, np.float32)})
        self.leave(row)

    def _mask(self, rows: Any) -> Tensor:
        mask = torch.zeros(self.rows, dtype=torch.bool)
        mask[list(rows)] = True
        return mask.to(self.device)


def _check(gen: LMGen, mimi: MimiModel, rows: int) -> None:
    model = gen.lm_model
    hears = model.num_codebooks - model.dep_q - 1
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    if not gen.support_out_of_sync:
        raise ValueError("gen must be made with support_out_of_sync=True: rows come and go")
    if not model.dep_q:
        raise ValueError("the model must speak; this one has dep_q = 0 and only writes")
    if not 1 <= hears <= mimi.num_codebooks:
        raise ValueError(
            f"the model must hear 1 to {mimi.num_codebooks} of Mimi's codebooks, got {hears}"
        )
