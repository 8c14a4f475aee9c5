"""Which replica has which conversation: so that one can be asked to let go of it.

An actor of its own, one for an application. It holds nothing that is not known elsewhere: if it is
restarted, replicas tell it what they have. While it is away sessions are taken up as they lie on
disk, and `Sessions` sees to it that one replica alone goes on with each.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayActorError

POLL_S = 10.0  # for which a replica waits to be asked for a session, before it asks again
LET_GO_S = 10.0  # for a replica to save a conversation and let go of it
ALIVE_S = 0.2  # between two looks whether a replica that is asked has died
log = logging.getLogger(__name__)


@dataclass
class _Replica:
    handle: Any  # its actor
    asked: asyncio.Queue[str] = field(default_factory=asyncio.Queue)

    async def alive(self) -> bool:
        """Whether its process is there; one that is busy or cut off counts as alive."""
        try:
            async with asyncio.timeout(ALIVE_S):
                await self.handle.__ray_ready__.remote()
        except RayActorError:
            return False
        except TimeoutError:
            pass
        return True


class Registry:
    """All methods are called through Ray; sessions by their keys, never by their names."""

    def __init__(self) -> None:
        self._replicas: dict[str, _Replica] = {}
        self._owners: dict[str, str] = {}
        self._gone: dict[tuple[str, str], asyncio.Event] = {}  # by key and replica

    async def asked(self, replica: str, handle: Any, held: list[str]) -> str | None:
        """Wait for a session that a replica is to let go of.

        Args:
            handle: of its actor.
            held: keys of its conversations, for a registry that does not know it yet.

        Returns:
            its key, or nothing: ask again.
        """
        if replica not in self._replicas:
            await self._forget_the_dead()
            self._replicas[replica] = _Replica(handle)
            for key in held:
                self._owners.setdefault(key, replica)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                return await self._replicas[replica].asked.get()
        return None

    async def take(self, key: str, replica: str) -> None:
        """A replica begins or takes up a session; returns once no other goes on with it."""
        before, self._owners[key] = self._owners.get(key), replica
        if before not in (None, replica) and (owner := self._replicas.get(before or "")):
            gone = self._gone.setdefault((key, before or ""), asyncio.Event())
            owner.asked.put_nowait(key)
            if not await _until(gone, owner, LET_GO_S):
                log.warning("replica %s does not let go of a session", before)
            self._gone.pop((key, before or ""), None)

    async def left(self, key: str, replica: str) -> None:
        """A replica does not go on with a session."""
        if self._owners.get(key) == replica:
            del self._owners[key]
        if gone := self._gone.get((key, replica)):
            gone.set()

    async def _forget_the_dead(self) -> None:
        names = list(self._replicas)
        alive = await asyncio.gather(*(each.alive() for each in self._replicas.values()))
        for name, there in zip(names, alive, strict=True):
            if not there:
                self._replicas.pop(name, None)
                for key in [key for key, owner in self._owners.items() if owner == name]:
                    del self._owners[key]


async def _until(event: asyncio.Event, replica: _Replica, seconds: float) -> bool:
    """Wait for a replica to do something, or to have died; returns whether either came."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not event.is_set() and await replica.alive():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(ALIVE_S):
                        await event.wait()
            return True
    return False
