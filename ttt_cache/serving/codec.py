"""How sound travels: what a client sends, and what it is sent."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Protocol

import numpy as np

from .opus import Opus
from .pcm import Pcm


class Codec(Protocol):
    """One conversation's two streams."""

    def decode(self, payload: bytes) -> AsyncIterator[np.ndarray]:
        """The frames, float32 `[frame_size]`, that a message completes.

        They are decoded as they are asked for: whoever has no room for more waits between two.

        Raises:
            ttt_cache.serving.errors.MalformedError: it is no such sound, and nothing after it is.
            ttt_cache.serving.errors.LostError: whatever codes it is gone.
        """
        ...

    async def encode(self, pcm: np.ndarray) -> bytes:
        """The bytes, possibly none, that a frame completes. May raise `LostError` too."""
        ...

    def close(self) -> None:
        """The conversation has ended."""
        ...


# By the name that a client asks with, each made from a rate (samples a second) and the samples of
# a frame. Moshi's own clients ask for nothing, and get Opus.
Codecs = Mapping[str, Callable[[int, int], Codec]]
CODECS: Codecs = {"opus": Opus, "pcm": Pcm}
