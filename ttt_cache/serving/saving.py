"""Conversations on their way to the disk and back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from .conversation import Conversation
from .errors import MOVED, TAKEN_OVER, RefusedError
from .metrics import Metrics
from .sessions import Sessions, TakenError
from .trouble import Trouble

if TYPE_CHECKING:
    from pathlib import Path

    from .engine import Session
    from .others import Others

T = TypeVar("T")
EXPIRE_S = 600.0  # between two looks for sessions that nobody came back to
log = logging.getLogger(__name__)


class Saving:
    """When a conversation is saved, and what becomes of it if the disk fails.

    Args:
        every: seconds.
        most: sessions that the disk has refused and that are held here.
        others: servers that share `sessions`; `None`: there are none, or they cannot be asked.
    """

    def __init__(
        self,
        sessions: Sessions,
        metrics: Metrics,
        every: float,
        most: int,
        others: Others | None = None,
    ) -> None:
        self._sessions, self._metrics, self._every = sessions, metrics, every
        self._most, self._others, self._given_up = most, others, False
        # What the disk refused of those who have left: nobody else has what is in them.
        self._unwritten: dict[str, tuple[Path, Session]] = {}
        self._trouble = Trouble(log, "a session could not be saved", "sessions are saved again")
        self._disk = ThreadPoolExecutor(1, "sessions")  # one: what was written first is read first

    def wanted(self, conversation: Conversation) -> bool:
        """Whether a conversation is to be saved; what is stepped from now on is not in it.

        It is while an earlier save is on its way, which may fail.
        """
        wanted = conversation.unsaved_since is not None and not self._given_up
        if wanted:
            conversation.changed, conversation.saved_at = False, time.monotonic()
        return wanted

    def give_up(self) -> None:
        """Leave on disk what was saved before."""
        self._given_up = True

    async def begin(self, name: str) -> Path:
        """A session begins; returns where it is to lie."""
        if self._others is not None:
            await self._others.take(name)
        return self._sessions.first(name)

    async def take(self, name: str) -> tuple[Path, Session]:
        """As `Sessions.take`, once no other server that can be asked goes on with it.

        Raises:
            RefusedError: the disk does not give it.
        """
        if self._others is not None:
            await self._others.take(name)
        if (unwritten := await self._write_again(name)) is not None:
            self._hold(name, unwritten)  # others did not, meanwhile, take its place
            return unwritten
        try:
            return await self._on_disk(self._sessions.take, name)
        except OSError as error:
            log.error("a session could not be read: %s", error)
            raise RefusedError(503, "disk", "the session cannot be read; try again later") from None

    def seated(self, conversation: Conversation) -> None:
        """A conversation has its row: what is not on the disk by now is to be saved from there."""
        if self._unwritten.pop(conversation.name, None) is not None:
            conversation.unsaved_since = time.monotonic()

    def left(self, name: str) -> None:
        """This server does not go on with a session any more."""
        if self._others is not None:
            self._others.left(name)

    async def write(self, conversation: Conversation, session: Session, last: bool = False) -> None:
        """A disk that is full is the operator's trouble, not the client's.

        Args:
            last: it has no row any more; what the disk refuses is held until it takes it.
        """
        assert conversation.path is not None, "sessions are kept"
        try:
            await self._put(conversation.path, session)
            # What was heard while it was written is not in it.
            conversation.unsaved_since = conversation.saved_at if conversation.changed else None
        except TakenError:
            conversation.end(TAKEN_OVER, MOVED)
        except OSError:
            if last:
                self._hold(conversation.name, (conversation.path, session))

    def _hold(self, name: str, unwritten: tuple[Path, Session]) -> None:
        """Hold what the disk refused, as the newest of at most `most`."""
        self._unwritten.pop(name, None)
        self._unwritten[name] = unwritten
        if len(self._unwritten) > self._most:
            lost, _ = self._unwritten.pop(next(iter(self._unwritten)))
            log.error("%s has lost its end: the disk takes none, and newer ones wait", lost.name)

    async def write_left(self) -> None:
        """Try again to write what could not be written of those who have left."""
        for name in list(self._unwritten):
            await self._write_again(name)

    async def _write_again(self, name: str) -> tuple[Path, Session] | None:
        """Try again to write a session; returns it if it is still nowhere but here."""
        if (unwritten := self._unwritten.get(name)) is None:
            return None
        try:
            await self._put(*unwritten)
        except TakenError:
            pass  # another server went on with what was on the disk, which is what its client knows
        except OSError:
            return unwritten
        if self._unwritten.get(name) is unwritten:
            del self._unwritten[name]
        return None

    async def _put(self, path: Path, session: Session) -> None:
        """Write a session.

        Raises:
            TakenError, OSError: as `Sessions.write`; the operator is told of a disk that fails.
        """
        try:
            self._metrics.saved(await self._on_disk(self._sessions.write, path, session))
            self._trouble.worked()
        except OSError as error:
            self._metrics.saved(None)
            self._trouble.failed(error)
            raise

    async def settled(self) -> None:
        """Wait until all that was handed to the disk before is there."""
        await self._on_disk(lambda: None)

    async def run(
        self,
        here: Collection[Conversation],
        take: Callable[[Conversation], Awaitable[Session | None]],
    ) -> None:
        """Save each conversation every so often, and delete old sessions, for ever.

        Args:
            here: a view of the conversations that there are.
            take: one as it is now, unless it has left.
        """
        unsaved = self._metrics.unsaved  # asked for, not set here: the disk may hang
        unsaved.set_function(lambda: max((each.unsaved_s for each in here), default=0.0))
        pause, looked, tried = min(self._every / 10, 1.0), -EXPIRE_S, time.monotonic()
        while True:
            if time.monotonic() - tried > self._every:
                tried = time.monotonic()
                await self.write_left()
            if time.monotonic() - looked > EXPIRE_S:
                looked = time.monotonic()
                await self._expire()
            for each in list(here):
                due = time.monotonic() - each.saved_at > self._every - 2 * pause
                if due and self.wanted(each) and (session := await take(each)) is not None:
                    await self.write(each, session)
            await asyncio.sleep(pause)

    async def _expire(self) -> None:
        try:
            await self._on_disk(self._sessions.expire)
        except OSError as error:
            log.error("old sessions could not be deleted: %s", error)

    async def _on_disk(self, work: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work, *args)
