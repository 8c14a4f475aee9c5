"""Opus in Ogg, as Moshi's clients send and expect it: bytes to whole frames and back."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import sphn

from .errors import MalformedError

# Bytes decoded at a time. An Ogg page of half a kilobyte may hold 255 packets of 120 ms, half a
# minute of silence: what a large message becomes must be taken in piece by piece.
PIECE = 512


class Opus:
    """One conversation's two streams.

    Args:
        rate: samples a second.
        frame_size: samples in a frame.
    """

    def __init__(self, rate: int, frame_size: int) -> None:
        self._frame_size = frame_size
        self._reader, self._writer = sphn.OpusStreamReader(rate), sphn.OpusStreamWriter(rate)
        self._rest = np.zeros(0, np.float32)

    def decode(self, payload: bytes) -> Iterator[np.ndarray]:
        """The frames, float32 `[frame_size]`, that a message completes.

        Raises:
            MalformedError: it is no Opus.
        """
        for start in range(0, len(payload), PIECE):
            try:
                pcm = self._reader.append_bytes(payload[start : start + PIECE])
            except BaseException as error:  # a panic of sphn's is no Exception
                raise MalformedError(f"not an Ogg/Opus stream: {error}") from None
            self._rest = np.concatenate([self._rest, pcm])
            while len(self._rest) >= self._frame_size:
                frame, self._rest = np.split(self._rest, [self._frame_size])
                yield frame

    def encode(self, pcm: np.ndarray) -> bytes:
        """The bytes, possibly none, that a frame completes."""
        return self._writer.append_pcm(pcm)
