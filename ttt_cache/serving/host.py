"""Who comes, who goes on, who leaves, and what of all that is on disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from .admission import Admission
from .clock import Clock
from .codec import CODECS, Codecs
from .conversation import Conversation
from .engine import Engine
from .errors import ABNORMAL, FAILED, GOING_AWAY
from .metrics import Metrics
from .saving import Saving
from .seats import Seats
from .sessions import Sessions, key

if TYPE_CHECKING:
    from .engine import Session
    from .others import Others


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
        self.metrics, self._engine, self._clock = metrics, engine, clock
        self._row_bytes = engine.state_bytes() // engine.rows
        self._saving = None
        if sessions is not None:
            self._saving = Saving(sessions, metrics, save_every, engine.rows, others)
        self._seats = Seats(engine.free)
        self._admission = Admission(self._seats, engine, clock, self._saving, codecs, piece)
        self._leaving: set[asyncio.Future[None]] = set()  # who went before they had come
        metrics.conversations.set_function(lambda: self.conversations)

    @property
    def conversations(self) -> int:
        """How many there are; those that have left, and wait for the disk, do not count."""
        return len(self._clock.conversations)

    @property
    def free(self) -> int:
        """How many more there can be."""
        return 0 if self.stopping else self._seats.left

    @property
    def rows(self) -> int:
        """How many there may be."""
        return self._engine.rows

    @property
    def stopping(self) -> bool:
        """Whether nobody is let in any more."""
        return self._seats.stopping

    @property
    def keeps_sessions(self) -> bool:
        """Whether a conversation can be gone on with."""
        return self._saving is not None

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
        admission = asyncio.ensure_future(self._admission.admit(name, codec))
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

    async def let_go(self, hashed: str) -> None:
        """Another server takes up a session, which may be here: returns once it is not.

        Args:
            hashed: `ttt_cache.serving.sessions.key` of its name.
        """
        while any(key(name) == hashed for name in self._seats.coming):
            await asyncio.sleep(0.05)
        for name in [name for name in self._seats.here if key(name) == hashed]:
            await self._seats.move(name)
        await self._write_left()

    async def leave(self, conversation: Conversation, code: int) -> None:
        """Save a conversation and free its row. Nothing that it raises keeps the row."""
        self._clock.conversations.pop(conversation.row, None)
        conversation.close()
        # Each that waits for the disk holds a whole session: while many do, nobody takes its place.
        if len(self._seats.here) - len(self._clock.conversations) <= self.rows:
            self._seats.give_back(conversation)  # its row is free before the next one asks for it
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
                    await saving.write(conversation, session, last=True)
                await saving.settled()  # what was taken of it before may be on its way
        finally:
            self._seats.here.pop(conversation.name, None)
            self._seats.give_back(conversation)
            if saving is not None:
                saving.left(conversation.name)
            self.metrics.ended(code)
            conversation.ended.set()

    async def save(self) -> None:
        """Save every conversation each `save_every` seconds, for ever."""
        if self._saving is not None:
            await self._saving.run(self._seats.here.values(), self._as_it_is)

    async def _write_left(self) -> None:
        if self._saving is not None:
            await self._saving.write_left()

    async def _as_it_is(self, conversation: Conversation) -> Session | None:
        if not self._clock.steps(conversation):
            return None  # it is leaving, and saved by that
        return await self._clock.call(self._engine.session, conversation.row)

    async def stop(self, code: int = GOING_AWAY, reason: str = "the server is stopping") -> None:
        """Turn new clients away, end every conversation and wait until each is saved."""
        self._seats.stopping = True
        while here := list(self._seats.here.values()):
            for each in here:
                each.end(code, reason)
            await asyncio.gather(*(each.ended.wait() for each in here))
        await self._write_left()  # of those whom nobody could go on with any more

    async def abandon(self) -> None:
        """The model has failed: end all, and leave on disk what was saved before."""
        if self._saving is not None:
            self._saving.give_up()
        await self.stop(FAILED, "the model has failed")
