"""Conversations that come piece by piece, looked into and cut anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .source import Piece


def peeked(pieces: Iterable[Piece]) -> tuple[int, Iterable[Piece]]:
    """How many rows pieces have, and the pieces.

    Raises:
        ValueError: there are none.
    """
    stream = iter(pieces)
    first = next(stream, None)
    if first is None:
        raise ValueError("pieces must hold at least one piece, got none")
    return first.codes.shape[0], chain([first], stream)


def regrouped(pieces: Iterable[Tensor], frames: int) -> Iterator[tuple[int, Tensor]]:
    """Codes `[B, K, S]` in pieces of equally many frames, each with the frame where it starts.

    What is left at the end, and too short, is dropped.
    """
    held, start = None, 0
    for piece in pieces:
        held = piece if held is None else torch.cat([held, piece], dim=2)
        while held.shape[2] >= frames:
            yield start, held[:, :, :frames]
            held, start = held[:, :, frames:], start + frames
