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
        others: servers that share `sessions`; `None`: there are none, or they cannot be asked.
    """

    def __init__(
        self, sessions: Sessions, metrics: Metrics, every: float, others: Others | None = None
    ) -> None:
        self._sessions, self._metrics, self._every = sessions, metrics, every
        self._others, self._given_up = others, False
        self._unwritten: dict[str, tuple[Path, Session]] = {}  # on their way from row to row
        self._disk = ThreadPoolExecutor(1, "sessions")  # one: what was written first is read first

    def wanted(self, conversation: Conversation) -> bool:
        """Whether a conversation is to be saved; what is stepped from now on is not in it."""
        wanted = conversation.changed and not self._given_up
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
        if (unwritten := self._unwritten.get(name)) is not None:
            return unwritten
        try:
            return await self._on_disk(self._sessions.take, name)
        except OSError as error:
            log.error("a session could not be read: %s", error)
            raise RefusedError(503, "disk", "the session cannot be read; try again later") from None

    def seated(self, conversation: Conversation) -> None:
        """A conversation has its row: what is not on the disk by now is to be saved from there."""
        if self._unwritten.pop(conversation.name, None) is not None:
            conversation.changed, conversation.unsaved_since = True, time.monotonic()

    def left(self, name: str) -> None:
        """This server does not go on with a session any more."""
        if self._others is not None:
            self._others.left(name)

    async def write(
        self, conversation: Conversation, session: Session, taken_over: bool = False
    ) -> None:
        """A disk that is full is the operator's trouble, not the client's.

        Args:
            taken_over: it is taken up again at once, if need be without the disk.
        """
        assert conversation.path is not None, "sessions are kept"
        try:
            size = await self._on_disk(self._sessions.write, conversation.path, session)
            self._metrics.saved(size)
            # What was heard while it was written is not in it.
            conversation.unsaved_since = conversation.saved_at if conversation.changed else None
        except TakenError:
            conversation.end(TAKEN_OVER, MOVED)
        except OSError as error:
            conversation.changed = True
            if taken_over:
                self._unwritten[conversation.name] = conversation.path, session
            self._metrics.saved(None)
            log.error("a session could not be saved: %s", error)

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
        pause, looked = min(self._every / 10, 1.0), -EXPIRE_S
        while True:
            if time.monotonic() - looked > EXPIRE_S:
                looked = time.monotonic()
                await self._expire()
            for each in list(here):
                due = time.monotonic() - each.saved_at > self._every - 2 * pause
                if due and self.wanted(each) and (session := await take(each)) is not None:
                    await self.write(each, session)
            now = time.monotonic()
            waiting = [now - each.unsaved_since for each in here if each.unsaved_since is not None]
            self._metrics.unsaved.set(max(waiting, default=0))
            await asyncio.sleep(pause)

    async def _expire(self) -> None:
        try:
            await self._on_disk(self._sessions.expire)
        except OSError as error:
            log.error("old sessions could not be deleted: %s", error)

    async def _on_disk(self, work: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work, *args)
