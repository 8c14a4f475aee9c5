"""How a client gets a row: of a new conversation, or of one that it goes on with."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from .clock import Clock
from .codec import Codecs
from .conversation import Conversation
from .engine import Engine
from .errors import RefusedError
from .saving import Saving
from .seats import Seats
from .sessions import NAME, TakenError, UnknownError, new_name

TWICE = "the conversation is being taken up by another client"
log = logging.getLogger(__name__)


class Admission:
    """Fills the seats.

    Args:
        engine: whose rows they are.
        clock: that steps them.
        saving: `None`: sessions are not kept.
        codecs: that a client may ask for.
        piece: the text of a token.
    """

    def __init__(
        self,
        seats: Seats,
        engine: Engine,
        clock: Clock,
        saving: Saving | None,
        codecs: Codecs,
        piece: Callable[[int], str],
    ) -> None:
        self._seats, self._engine, self._clock, self._saving = seats, engine, clock, saving
        self._codecs, self._piece = codecs, piece

    def admit(self, name: str | None, codec: str) -> Coroutine[Any, Any, Conversation]:
        """Take a seat at once; who awaits the rest has a row.

        Raises:
            RefusedError: here or there.
        """
        self._seats.refuse_if_stopping()
        if codec not in self._codecs:
            raise RefusedError(400, "codec", f"codec must be one of {', '.join(self._codecs)}")
        return self._begin(codec) if name is None else self._go_on(name, codec)

    def _begin(self, codec: str) -> Coroutine[Any, Any, Conversation]:
        self._seats.claim()
        name = new_name()
        return self._seated(name, codec, self._join(name))

    async def _join(self, name: str) -> tuple[int, Path | None]:
        path = None if self._saving is None else await self._saving.begin(name)
        return await self._clock.call(self._engine.join), path

    def _go_on(self, name: str, codec: str) -> Coroutine[Any, Any, Conversation]:
        """Take up a session. Whoever knows its name owns it: its connection may be a dead one."""
        if self._saving is None:
            raise RefusedError(404, "unknown", "this server keeps no sessions")
        if NAME.fullmatch(name) is None:  # before it takes a seat from others
            raise RefusedError(404, "unknown", "no such session")
        if name in self._seats.coming:
            raise RefusedError(409, "twice", TWICE)
        before = self._seats.here.get(name)
        self._seats.claim(before)
        self._seats.coming.add(name)
        return self._taken_up(name, codec, self._resume(self._saving, name, before is not None))

    async def _taken_up(
        self, name: str, codec: str, resuming: Awaitable[tuple[int, Path | None]]
    ) -> Conversation:
        try:
            await self._seats.move(name)
            return await self._seated(name, codec, resuming)
        finally:
            self._seats.coming.discard(name)

    async def _resume(self, saving: Saving, name: str, taken_over: bool) -> tuple[int, Path | None]:
        try:
            path, session = await saving.take(name)
            return await self._clock.call(self._engine.resume, path, session), path
        except UnknownError as error:
            if taken_over:  # before a frame of it was saved
                return await self._join(name)
            raise RefusedError(404, "unknown", str(error)) from None
        except TakenError:
            raise RefusedError(409, "twice", TWICE) from None
        except ValueError as error:
            log.error("a session was refused: %s", error)
            raise RefusedError(409, "foreign", "the session is not of this model") from None

    async def _seated(
        self, name: str, codec: str, coming: Awaitable[tuple[int, Path | None]]
    ) -> Conversation:
        """Put a client that has a seat into its row."""
        try:
            row, path = await coming
            try:
                self._seats.refuse_if_stopping()  # meanwhile
                rate = int(self._engine.mimi.sample_rate)
                sound = self._codecs[codec](rate, self._engine.frame_size)
            except BaseException:
                await self._clock.call(self._engine.leave, row)
                raise
        except BaseException:
            self._seats.left += 1
            if self._saving is not None:
                self._saving.left(name)
            raise
        conversation = Conversation(name, row, sound, self._clock.wake, self._piece, path)
        if self._saving is not None:
            self._saving.seated(conversation)
        self._seats.here[name] = self._clock.conversations[row] = conversation
        return conversation
