"""One client: its frames on the way to the model, and its answers on the way back.

Both queues are short. A client that sends faster than the model hears is read more slowly; one that
reads more slowly than the model speaks is not stepped: no frame is lost, and none piles up.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .codec import Codec
    from .engine import Answer

INBOX = OUTBOX = 25  # frames, 2 seconds
FRAME_S = 0.08
AUDIO, TEXT = b"\x01", b"\x02"
SILENT = (0, 3)  # tokens that stand for no text: end of a word's padding, and padding


class Conversation:
    """A row's client.

    Args:
        name: the session that it is saved under.
        row: of the engine.
        codec: of its sound.
        wake: called when there is a frame to step, or room for an answer again.
        piece: the text of a token.
        path: that it is saved to; `None`: it is not.
    """

    def __init__(
        self,
        name: str,
        row: int,
        codec: Codec,
        wake: Callable[[], None],
        piece: Callable[[int], str],
        path: Path | None = None,
    ) -> None:
        self.name, self.row, self.path = name, row, path
        self.saved_at = time.monotonic()  # or it was tried
        self.changed = False  # since then
        self.seated = True  # until another client may have its place among the rows
        self.unsaved_since: float | None = None  # when the oldest frame came that is not on disk
        self.ended = asyncio.Event()  # its row is free, and it is on disk
        self.ending: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()
        self._codec, self._wake, self._piece = codec, wake, piece
        self._inbox: deque[tuple[np.ndarray, float]] = deque()
        self._room = asyncio.Event()
        self._outbox: asyncio.Queue[Answer] = asyncio.Queue(OUTBOX)
        self._due = 0.0  # when the frame that is with the model is to be answered

    @property
    def unsaved_s(self) -> float:
        """Seconds for which its oldest frame that is not on disk has waited for that."""
        return 0.0 if self.unsaved_since is None else time.monotonic() - self.unsaved_since

    def end(self, code: int, reason: str) -> None:
        """Close the connection, unless it is being closed already."""
        if not self.ending.done():
            self.ending.set_result((code, reason))

    def close(self) -> None:
        """It has neither ears nor mouth any more."""
        self._codec.close()

    async def hear(self, payload: bytes) -> int:
        """Take in sound, as soon as there is room for all of it; returns how many frames it was.

        Raises:
            MalformedError: it cannot be decoded.
            LostError: whatever decodes it is gone.
        """
        frames = 0
        async for frame in self._codec.decode(payload):
            while len(self._inbox) >= INBOX:
                self._room.clear()
                await self._room.wait()
            self._inbox.append((frame, time.monotonic()))
            self._wake()
            frames += 1
            await asyncio.sleep(0)  # others, where one message holds many frames
        return frames

    @property
    def ready(self) -> bool:
        """Whether there is a frame to step, and room for its answer."""
        return bool(self._inbox) and not self._outbox.full()

    def take(self) -> np.ndarray:
        """The next frame for the model, float32 `[frame_size]`."""
        frame, arrived = self._inbox.popleft()
        self._room.set()
        # A client that sends ahead is due an answer at the pace of speech.
        self._due = max(self._due, arrived) + FRAME_S
        self.changed = True
        if self.unsaved_since is None:
            self.unsaved_since = time.monotonic()
        return frame

    def answer(self, answer: Answer | None) -> bool:
        """Put an answer on its way; returns whether it was late."""
        if answer is not None:
            self._outbox.put_nowait(answer)
        late = time.monotonic() > self._due
        if late:  # the next frame is not late because this one was
            self._due = time.monotonic()
        return late

    async def messages(self) -> list[bytes]:
        """Wait for the next answer; returns what to send, in Moshi's protocol.

        Raises:
            LostError: whatever encodes it is gone.
        """
        answer = await self._outbox.get()
        self._wake()
        sent = []
        if sound := await self._codec.encode(answer.pcm):
            sent.append(AUDIO + sound)
        if answer.token not in SILENT:
            sent.append(TEXT + self._piece(answer.token).replace("▁", " ").encode())
        return sent
