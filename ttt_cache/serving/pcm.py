"""Plain 16-bit samples, for browsers: none has to bring an encoder, and none costs the server."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np

from .errors import MalformedError

WIDTH = 2  # bytes of a sample
SCALE = 32767.0


class Pcm:
    """One conversation's two streams of little-endian int16, one channel.

    Args:
        rate: samples a second; a client sends and is sent at the model's.
        frame_size: samples in a frame.
    """

    def __init__(self, rate: int, frame_size: int) -> None:
        self._bytes = frame_size * WIDTH
        self._rest = b""

    async def decode(self, payload: bytes) -> AsyncIterator[np.ndarray]:
        """The frames, float32 `[frame_size]`, that a message completes.

        Raises:
            MalformedError: it ends within a sample.
        """
        if len(payload) % WIDTH:
            raise MalformedError(f"samples have {WIDTH} bytes each, got {len(payload)} bytes")
        self._rest += payload
        while len(self._rest) >= self._bytes:
            frame, self._rest = self._rest[: self._bytes], self._rest[self._bytes :]
            yield np.frombuffer(frame, "<i2").astype(np.float32) / SCALE

    async def encode(self, pcm: np.ndarray) -> bytes:
        """The bytes of a frame, louder than full scale cut off."""
        return (pcm.clip(-1, 1) * SCALE).astype("<i2").tobytes()

    def close(self) -> None:
        """Nothing is held."""
