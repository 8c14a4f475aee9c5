"""Opus in Ogg, as Moshi's clients send and expect it: bytes to whole frames and back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

import numpy as np

from .errors import MalformedError
from .opus_worker import Streams

# Bytes decoded at a time. An Ogg page of half a kilobyte may hold 255 packets of 120 ms, half a
# minute of silence: what a large message becomes must be taken in piece by piece.
PIECE = 512


class Coder(Protocol):
    """What codes one conversation's two streams, here or elsewhere; samples are float32."""

    async def encode(self, pcm: bytes) -> bytes:
        """The Ogg/Opus, possibly none, that samples complete."""
        ...

    async def decode(self, opus: bytes) -> bytes:
        """The samples that Ogg/Opus completes. Raises `ValueError` if it is none."""
        ...

    def close(self) -> None:
        """Nothing more is coded."""
        ...


class Here:
    """A coder in this process, which does nothing else meanwhile.

    Args:
        rate: samples a second.
    """

    def __init__(self, rate: int) -> None:
        self._streams = Streams(rate)

    async def encode(self, pcm: bytes) -> bytes:
        return self._streams.encode(pcm)

    async def decode(self, opus: bytes) -> bytes:
        return self._streams.decode(opus)

    def close(self) -> None:
        pass


class Opus:
    """One conversation's two streams.

    Args:
        rate: samples a second.
        frame_size: samples in a frame.
        coder: of the same rate; by default one in this process.
    """

    def __init__(self, rate: int, frame_size: int, coder: Coder | None = None) -> None:
        self._frame_size, self._coder = frame_size, coder or Here(rate)
        self._rest = np.zeros(0, np.float32)

    async def decode(self, payload: bytes) -> AsyncIterator[np.ndarray]:
        """The frames, float32 `[frame_size]`, that a message completes.

        Raises:
            MalformedError: it is no Opus.
            LostError: whatever codes it is gone.
        """
        for start in range(0, len(payload), PIECE):
            try:
                pcm = await self._coder.decode(payload[start : start + PIECE])
            except ValueError as error:
                raise MalformedError(f"not an Ogg/Opus stream: {error}") from None
            self._rest = np.concatenate([self._rest, np.frombuffer(pcm, np.float32)])
            while len(self._rest) >= self._frame_size:
                frame, self._rest = np.split(self._rest, [self._frame_size])
                yield frame

    async def encode(self, pcm: np.ndarray) -> bytes:
        """The bytes, possibly none, that a frame completes.

        Raises:
            LostError: whatever codes it is gone.
        """
        return await self._coder.encode(pcm.tobytes())

    def close(self) -> None:
        """Nothing more is coded."""
        self._coder.close()
