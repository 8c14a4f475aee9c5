"""Who comes, who goes on, who leaves, and what of all that is on disk."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .clock import Clock
from .codec import CODECS, Codecs
from .conversation import Conversation
from .engine import Engine, FullError
from .errors import FAILED, GOING_AWAY, TAKEN_OVER, RefusedError
from .metrics import Metrics
from .sessions import Sessions, TakenError, UnknownError, key, new_name

if TYPE_CHECKING:
    from .engine import Session
    from .others import Others

T = TypeVar("T")
TWICE = "the conversation is being taken up by another client"
MOVED = "the conversation goes on in another connection"
EXPIRE_S = 600.0  # between two looks for sessions that nobody came back to
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
        self._sessions, self._save_every, self._others = sessions, save_every, others
        self._disk = ThreadPoolExecutor(1, "sessions")  # one: what was written first is read first
        self._here: dict[str, Conversation] = {}  # by name
        self._coming: set[str] = set()  # names of sessions that are being taken up

    @property
    def conversations(self) -> int:
        """How many there are."""
        return len(self._here)

    @property
    def rows(self) -> int:
        """How many there may be."""
        return self._engine.rows

    @property
    def keeps_sessions(self) -> bool:
        """Whether a conversation can be gone on with."""
        return self._sessions is not None

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
        """
        self._refuse_if_stopping()
        if codec not in self._codecs:
            raise RefusedError(400, "codec", f"codec must be one of {', '.join(self._codecs)}")
        try:
            name, row, path = await (self._begin() if name is None else self._go_on(name))
        except FullError:
            raise RefusedError(
                503, "full", "all conversations are taken; try again later"
            ) from None
        try:
            self._refuse_if_stopping()  # meanwhile
        except RefusedError:
            self._engine.leave(row)
            raise
        return self._seat(name, row, codec, path)

    def _refuse_if_stopping(self) -> None:
        if self.stopping:
            raise RefusedError(503, "stopping", "the server is stopping")

    async def _begin(self) -> tuple[str, int, Path | None]:
        if not self._engine.free:  # before any work is done for it
            raise FullError
        name = new_name()
        if self._others is not None:
            await self._others.take(name)
        path = None if self._sessions is None else self._sessions.first(name)
        return name, await self._clock.call(self._engine.join), path

    async def _go_on(self, name: str) -> tuple[str, int, Path]:
        """Take up a session. Whoever knows its name owns it: its connection may be a dead one."""
        if self._sessions is None:
            raise RefusedError(404, "unknown", "this server keeps no sessions")
        if name in self._coming:
            raise RefusedError(409, "twice", TWICE)
        self._coming.add(name)
        try:
            await self._end(name)
            return await self._resume(self._sessions, name)
        except UnknownError as error:
            raise RefusedError(404, "unknown", str(error)) from None
        except TakenError:
            raise RefusedError(409, "twice", TWICE) from None
        except ValueError as error:
            log.error("a session was refused: %s", error)
            raise RefusedError(409, "foreign", "the session is not of this model") from None
        finally:
            self._coming.discard(name)

    async def _resume(self, sessions: Sessions, name: str) -> tuple[str, int, Path]:
        if self._others is not None:
            await self._others.take(name)
        try:
            if not self._engine.free:
                raise FullError
            path, session = await self._on_disk(sessions.take, name)
            return name, await self._clock.call(self._engine.resume, path, session), path
        except BaseException:
            if self._others is not None:
                self._others.left(name)
            raise

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

    @property
    def keys(self) -> list[str]:
        """`ttt_cache.serving.sessions.key` of every conversation."""
        return list(map(key, self._here))

    def _seat(self, name: str, row: int, codec: str, path: Path | None) -> Conversation:
        sound = self._codecs[codec](int(self._engine.mimi.sample_rate), self._engine.frame_size)
        conversation = Conversation(name, row, sound, self._clock.wake, self._piece, path)
        self._here[name] = self._clock.conversations[row] = conversation
        self.metrics.conversations.set(len(self._here))
        return conversation

    async def leave(self, conversation: Conversation, code: int) -> None:
        """Save a conversation and free its row. Nothing that it raises keeps the row."""
        self._clock.conversations.pop(conversation.row, None)
        conversation.close()
        wanted = self._wanted(conversation)

        def last() -> Session | None:
            try:
                return self._engine.session(conversation.row) if wanted else None
            finally:
                self._engine.leave(conversation.row)

        try:
            if (session := await self._clock.call(last)) is not None:
                await self._write(conversation, session)
        finally:
            self._here.pop(conversation.name, None)
            if self._others is not None:
                self._others.left(conversation.name)
            self.metrics.conversations.set(len(self._here))
            self.metrics.ended(code)
            conversation.ended.set()

    def _wanted(self, conversation: Conversation) -> bool:
        """Whether a conversation is to be saved; what is stepped from now on is not in it."""
        wanted = self._sessions is not None and conversation.changed
        if wanted:
            conversation.changed, conversation.saved_at = False, time.monotonic()
        return wanted

    async def _write(self, conversation: Conversation, session: Session) -> None:
        """A disk that is full is the operator's trouble, not the client's."""
        if self._sessions is None or conversation.path is None:
            return
        try:
            size = await self._on_disk(self._sessions.write, conversation.path, session)
            self.metrics.saved(size)
        except TakenError:
            conversation.end(TAKEN_OVER, MOVED)
        except OSError as error:
            conversation.changed = True
            self.metrics.saved(None)
            log.error("a session could not be saved: %s", error)

    async def save(self) -> None:
        """Save every conversation each `save_every` seconds, and delete old sessions, for ever."""
        pause, looked = min(self._save_every / 10, 1.0), -EXPIRE_S
        while self._sessions is not None:
            if time.monotonic() - looked > EXPIRE_S:
                looked = time.monotonic()
                await self._on_disk(self._sessions.expire)
            for each in list(self._here.values()):
                if time.monotonic() - each.saved_at > self._save_every - 2 * pause:
                    await self._save_one(each)
            now = time.monotonic()
            waiting = [now - each.saved_at for each in self._here.values() if each.changed]
            self.metrics.unsaved.set(max(waiting, default=0))
            await asyncio.sleep(pause)

    async def _save_one(self, conversation: Conversation) -> None:
        here = self._clock.conversations.get(conversation.row) is conversation
        if here and self._wanted(conversation):
            taken = await self._clock.call(self._engine.session, conversation.row)
            await self._write(conversation, taken)

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
        self._sessions = None
        await self.stop(FAILED, "the model has failed")

    async def _on_disk(self, work: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work, *args)
