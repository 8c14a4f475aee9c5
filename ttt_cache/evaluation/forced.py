"""Teacher-forced conversations of any length: what a model makes of each frame, in order."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from torch import Tensor

from ttt_cache.patch import require_patch
from ttt_cache.training.carry import Carry
from ttt_cache.training.data import LMFacts
from ttt_cache.training.loss import predict

from .delays import Delays
from .rings import make_room
from .source import SEGMENT, Piece


class Scores(NamedTuple):
    """What a model makes of S frames of B conversations; tensors are on the CPU.

    Attributes:
        start: the first of these frames, from 0.
        text, first, rest: nats of the frame's text token, of Moshi's first codebook and, on
            average, of its others; float32 `[B, S]`. NaN where nothing is predicted: where a code
            is missing, and in the last frames of a conversation, whose delayed codes would need
            frames behind its end (so does `LMModel.forward`).
        choices: the most likely tokens of text and Moshi's codebooks, each where those before it
            in its frame are the true ones; int64 `[B, 1 + dep_q, S]`, -1 in those last frames.
    """

    start: int
    text: Tensor
    first: Tensor
    rest: Tensor
    choices: Tensor

    @property
    def total(self) -> Tensor:
        """Nats of the whole frame, text and all of Moshi's codebooks, `[B, S]`."""
        return self.text + self.first + (self.choices.shape[1] - 2) * self.rest


class Steps(NamedTuple):
    """What a model's steps predict, `[B, 1 + dep_q, S]`: text, then Moshi's codebooks.

    A step predicts a stream's frame as many frames ago as the stream is delayed. `nats` are
    float32, `choices` int64, and `there`, bool, says where that frame has a code: there `nats` are
    finite, elsewhere they are NaN.
    """

    nats: Tensor
    choices: Tensor
    there: Tensor


class Forcing:
    """B conversations that a patched model hears and says, token by token as they were.

    Memory does not grow with their length. Layers without a patch go on as stock Moshi does.

    Args:
        lm: the patched model; with `ttt_cache.patch(lm, preset="full-context")` it is stock Moshi.
        rows: B.

    Raises:
        RuntimeError: the model is not patched.
        ValueError: its positions are sinusoidal, a layer has no context, or it says fewer than two
            codebooks (`dep_q`): moshi 0.2.13's `LMModel.forward_depformer_training`, which scores
            all codebooks of a frame at once, asserts that there are two.
    """

    def __init__(self, lm: LMModel, rows: int) -> None:
        require_two_codebooks(lm)
        self.lm, self.facts, self.rows = lm, LMFacts.of(lm), rows
        self.carry, self._frames = Carry(require_patch(lm)), 0
        self._whole = self.carry.caches
        self._delays = Delays(self.facts, rows, lm.device)

    @torch.no_grad()
    def feed(self, codes: Tensor) -> Steps:
        """The next frames, not delayed, int64 `[B, K, S]`; one step each.

        Raises:
            ValueError: the codes are of other rows or codebooks.
            RuntimeError: the model is streaming, or what it makes of a code is not finite.
        """
        expected = self.rows, self.facts.codebooks
        if tuple(codes.shape[:2]) != expected:
            raise ValueError(f"codes must be {list(expected)} by frames, got {list(codes.shape)}")
        delayed = self._delays.take(codes)
        self._frames += codes.shape[2]
        make_room(self.carry, self._whole, self._frames, self.rows)
        with self.carry.segment(torch.zeros(self.rows, dtype=torch.bool, device=delayed.device)):
            logits = predict(self.lm, delayed)
        said = slice(0, 1 + self.facts.dep_q)
        there = self.facts.predicted(delayed)[:, said].cpu()
        parts = [logits.text, *logits.audio.unbind(1)]
        scored = [_scored(part, delayed[:, k, 1:]) for k, part in enumerate(parts)]
        nats, choices = (torch.stack(each, dim=1).cpu() for each in zip(*scored, strict=True))
        self._require_finite(nats, there)
        return Steps(nats.masked_fill(~there, torch.nan), choices, there)

    def _require_finite(self, nats: Tensor, there: Tensor) -> None:
        """A model that explodes is no model that predicts nothing: NaN must not pass for that.

        The frame named is the first that is hit. That may be before the one where it began, but in
        the same segment: attention multiplies what it must not see by zero, and NaN stays NaN.
        """
        bad = there & ~nats.isfinite()
        if not bad.any():
            return
        step, stream, row = bad.permute(2, 1, 0).nonzero()[0].tolist()
        frame = self._frames - nats.shape[2] + step - self.facts.delays[stream]
        what = f"codebook {stream} of Moshi" if stream else "text"
        raise RuntimeError(
            f"frame {frame} of row {row}: the cross-entropy of {what} is "
            f"{nats[row, stream, step].item()}, it must be finite; the model or its memory has "
            "exploded, so nothing can be measured of it"
        )

    def fork(self) -> Forcing:
        """The same conversations so far; what is fed to one is not heard by the other."""
        fork = copy.copy(self)
        fork._delays = copy.copy(self._delays)  # takes replace what it holds
        fork.carry = copy.copy(self.carry)  # a segment replaces states and changes none
        return fork


def require_two_codebooks(lm: LMModel) -> None:
    """Raise `ValueError` if a model's codebooks cannot be scored."""
    if lm.dep_q < 2:
        raise ValueError(
            f"the model says dep_q={lm.dep_q} codebooks: dep_q must be at least 2 to be scored, "
            f"got {lm.dep_q}, since Moshi's training form of the depformer refuses fewer"
        )


def forced(lm: LMModel, pieces: Iterable[Piece], rows: int) -> Iterator[tuple[Scores, Piece]]:
    """Run conversations through a model and score every frame.

    Args:
        lm: the patched model, as in `Forcing`, which says what is refused.
        pieces: consecutive pieces of `rows` conversations.

    Yields:
        scores and the frames that they are of; together all frames of all pieces, in order. Pieces
        are cut anew: a frame is scored when its last delayed code has been predicted.
    """
    forcing, start = Forcing(lm, rows), 0
    held: _Held | None = None
    for piece in pieces:
        for part in _cut(piece, SEGMENT):
            steps = forcing.feed(part.codes)
            new = _Held(part, steps.nats, steps.choices)
            held = new if held is None else held.joined(new)
            ready = held.nats.shape[2] - max(forcing.facts.delays)
            if ready > 0:
                yield held.scored(ready, start, forcing.facts)
                start, held = start + ready, held.after(ready)
    if held is not None:
        held = held.ended(max(forcing.facts.delays), forcing.facts.zero)
        yield held.scored(held.piece.codes.shape[2], start, forcing.facts)


class _Held(NamedTuple):
    """Frames that are not scored yet, and the steps from the first of them on."""

    piece: Piece
    nats: Tensor
    choices: Tensor

    def scored(self, frames: int, start: int, facts: LMFacts) -> tuple[Scores, Piece]:
        """The first frames, each stream's at the step that predicts it."""
        delays = facts.delays[: 1 + facts.dep_q]
        lines = [slice(delay, delay + frames) for delay in delays]
        nats = [self.nats[:, k, line] for k, line in enumerate(lines)]
        choices = torch.stack([self.choices[:, k, line] for k, line in enumerate(lines)], dim=1)
        rest = torch.stack(nats[2:]).mean(0)
        return Scores(start, nats[0], nats[1], rest, choices), _slice(self.piece, 0, frames)

    def joined(self, new: _Held) -> _Held:
        marks = {n: torch.cat([m, new.piece.marks[n]], 1) for n, m in self.piece.marks.items()}
        piece = Piece(torch.cat([self.piece.codes, new.piece.codes], 2), marks)
        nats, choices = (
            torch.cat([self.nats, new.nats], 2),
            torch.cat([self.choices, new.choices], 2),
        )
        return _Held(piece, nats, choices)

    def after(self, frames: int) -> _Held:
        piece = _slice(self.piece, frames, None)
        return _Held(piece, self.nats[:, :, frames:], self.choices[:, :, frames:])

    def ended(self, steps: int, nothing: int) -> _Held:
        """With steps behind the end, which predict nothing."""
        nats = F.pad(self.nats, (0, steps), value=torch.nan)
        return _Held(self.piece, nats, F.pad(self.choices, (0, steps), value=nothing))


def _scored(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Nats of the targets `[B, S]`, which must be tokens to mean anything, and the likeliest."""
    logits = logits.float()
    tokens = target.clamp(0, logits.shape[-1] - 1)
    chosen = logits.gather(-1, tokens[..., None])[..., 0]
    return logits.logsumexp(-1) - chosen, logits.argmax(-1)


def _cut(piece: Piece, frames: int) -> Iterator[Piece]:
    for begin in range(0, piece.codes.shape[2], frames):
        yield _slice(piece, begin, begin + frames)


def _slice(piece: Piece, begin: int, end: int | None) -> Piece:
    marks = {name: mark[:, begin:end] for name, mark in piece.marks.items()}
    return Piece(piece.codes[:, :, begin:end], marks)
