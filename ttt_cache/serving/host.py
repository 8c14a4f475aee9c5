"""Who comes, who goes on, who leaves, and what of all that is on disk."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .clock import Clock
from .codec import CODECS, Codecs
from .conversation import Conversation
from .engine import Engine
from .errors import ABNORMAL, FAILED, GOING_AWAY, MOVED, TAKEN_OVER, RefusedError
from .metrics import Metrics
from .saving import Saving
from .sessions import NAME, Sessions, TakenError, UnknownError, key, new_name

if TYPE_CHECKING:
    from .engine import Session
    from .others import Others

TWICE = "the conversation is being taken up by another client"
log = logging.getLogger(__name__)


class Host:
    """The conversations of a server.

    Args:
        engine: whose rows they are.
        clock: that steps them.
        piece: the text of a token.
        sessions: where they are saved; `None`: they are not.
        save_every: seconds.
        others: servers that share `sessions`; `None`: there are none, or they cannot be asked.
        codecs: that a client may ask for.
    """

    def __init__(
        self,
        engine: Engine,
        clock: Clock,
        metrics: Metrics,
        piece: Callable[[int], str],
        sessions: Sessions | None = None,
        save_every: float = 30.0,
        others: Others | None = None,
        codecs: Codecs = CODECS,
    ) -> None:
        self.metrics, self.stopping = metrics, False
        self._engine, self._clock, self._piece = engine, clock, piece
        self._codecs = codecs
        self._row_bytes = engine.state_bytes() // engine.rows
        self._saving = None
        if sessions is not None:
            self._saving = Saving(sessions, metrics, save_every, others)
        self._seats = engine.free  # that nobody has, or is about to have
        self._here: dict[str, Conversation] = {}  # by name
        self._coming: set[str] = set()  # names of sessions that are being taken up
        self._leaving: set[asyncio.Future[None]] = set()  # who went before they had come

    @property
    def conversations(self) -> int:
        """How many there are."""
        return len(self._here)

    @property
    def free(self) -> int:
        """How many more there can be."""
        return 0 if self.stopping else self._seats

    @property
    def rows(self) -> int:
        """How many there may be."""
        return self._engine.rows

    @property
    def keeps_sessions(self) -> bool:
        """Whether a conversation can be gone on with."""
        return self._saving is not None

    @property
    def keys(self) -> list[str]:
        """`ttt_cache.serving.sessions.key` of every conversation."""
        return list(map(key, self._here))

    def described(self, conversation: Conversation) -> dict[str, str | int]:
        """What a client is told: its session's name, frames so far, bytes of its state."""
        return {
            "session": conversation.name,
            "frames": self._engine.age(conversation.row),
            "state_bytes": self._row_bytes,
        }

    async def admit(self, name: str | None, codec: str = "opus") -> Conversation:
        """Give a client a row.

        Args:
            name: of the session to go on with; `None` begins a new one.
            codec: the name of one.

        Raises:
            RefusedError: with the HTTP status to refuse it with.

        `free` shows it before anything else happens.
        """
        self._refuse_if_stopping()
        if codec not in self._codecs:
            raise RefusedError(400, "codec", f"codec must be one of {', '.join(self._codecs)}")
        coming = self._begin(codec) if name is None else self._go_on(name, codec)
        admission = asyncio.ensure_future(coming)
        try:
            return await asyncio.shield(admission)
        except asyncio.CancelledError:  # the row comes all the same, and must not be lost
            admission.add_done_callback(self._nobody_came)
            raise

    def _nobody_came(self, admission: asyncio.Future[Conversation]) -> None:
        if admission.exception() is None:
            leaving = asyncio.ensure_future(self.leave(admission.result(), ABNORMAL))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)

    def _refuse_if_stopping(self) -> None:
        if self.stopping:
            raise RefusedError(503, "stopping", "the server is stopping")

    def _claim(self) -> None:
        """Take a seat: a row, before the model's thread has given one."""
        if not self._seats:
            raise RefusedError(503, "full", "all conversations are taken; try again later")
        self._seats -= 1

    def _begin(self, codec: str) -> Coroutine[Any, Any, Conversation]:
        self._claim()
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
        if name in self._coming:
            raise RefusedError(409, "twice", TWICE)
        before = self._here.get(name)
        if before is None or not self._is_stepped(before):
            self._claim()  # else it leaves its seat to whoever comes for it
        self._coming.add(name)
        return self._taken_up(name, codec, self._resume(self._saving, name, before is not None))

    async def _taken_up(
        self, name: str, codec: str, resuming: Awaitable[tuple[int, Path | None]]
    ) -> Conversation:
        try:
            await self._end(name)
            return await self._seated(name, codec, resuming)
        finally:
            self._coming.discard(name)

    async def _end(self, name: str) -> None:
        """End a conversation that goes on elsewhere; returns once it is on disk."""
        if before := self._here.get(name):
            before.end(TAKEN_OVER, MOVED)
            await before.ended.wait()

    async def let_go(self, hashed: str) -> None:
        """Another server takes up a session, which may be here: returns once it is not.

        Args:
            hashed: `ttt_cache.serving.sessions.key` of its name.
        """
        while any(key(name) == hashed for name in self._coming):
            await asyncio.sleep(0.05)
        for name in [name for name in self._here if key(name) == hashed]:
            await self._end(name)

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
                self._refuse_if_stopping()  # meanwhile
                rate = int(self._engine.mimi.sample_rate)
                sound = self._codecs[codec](rate, self._engine.frame_size)
            except BaseException:
                await self._clock.call(self._engine.leave, row)
                raise
        except BaseException:
            self._seats += 1
            if self._saving is not None:
                self._saving.left(name)
            raise
        conversation = Conversation(name, row, sound, self._clock.wake, self._piece, path)
        if self._saving is not None:
            self._saving.seated(conversation)
        self._here[name] = self._clock.conversations[row] = conversation
        self.metrics.conversations.set(len(self._here))
        return conversation

    async def leave(self, conversation: Conversation, code: int) -> None:
        """Save a conversation and free its row. Nothing that it raises keeps the row."""
        self._clock.conversations.pop(conversation.row, None)
        conversation.close()
        if not (taken_over := conversation.name in self._coming):
            self._seats += 1  # the model's thread does as asked in order: the row will be free
        saving = self._saving
        wanted = saving is not None and saving.wanted(conversation)

        def last() -> Session | None:
            try:
                return self._engine.session(conversation.row) if wanted else None
            finally:
                self._engine.leave(conversation.row)

        try:
            session = await self._clock.call(last)
            if saving is not None:
                if session is not None:
                    await saving.write(conversation, session, taken_over)
                await saving.settled()  # what was taken of it before may be on its way
        finally:
            self._here.pop(conversation.name, None)
            if saving is not None:
                saving.left(conversation.name)
            self.metrics.conversations.set(len(self._here))
            self.metrics.ended(code)
            conversation.ended.set()

    async def save(self) -> None:
        """Save every conversation each `save_every` seconds, for ever."""
        if self._saving is not None:
            await self._saving.run(self._here.values(), self._as_it_is)

    async def _as_it_is(self, conversation: Conversation) -> Session | None:
        if not self._is_stepped(conversation):
            return None  # it is leaving, and saved by that
        return await self._clock.call(self._engine.session, conversation.row)

    def _is_stepped(self, conversation: Conversation) -> bool:
        """Whether it has not begun to leave."""
        return self._clock.conversations.get(conversation.row) is conversation

    async def stop(self, code: int = GOING_AWAY, reason: str = "the server is stopping") -> None:
        """Turn new clients away, end every conversation and wait until each is saved."""
        self.stopping = True
        while self._here:
            here = list(self._here.values())
            for each in here:
                each.end(code, reason)
            await asyncio.gather(*(each.ended.wait() for each in here))

    async def abandon(self) -> None:
        """The model has failed: end all, and leave on disk what was saved before."""
        if self._saving is not None:
            self._saving.give_up()
        await self.stop(FAILED, "the model has failed")
