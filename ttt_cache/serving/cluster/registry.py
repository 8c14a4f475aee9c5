"""Which replica has which conversation: so that one can be asked to let go of it.

An actor of its own, one for an application. It holds nothing that is not known elsewhere. While it
is away sessions are taken up as they lie on disk, and `Sessions` sees to it that one replica alone
goes on with each.

A replica numbers its stays: the times that it has some session, each from `take` to `left`.
Messages may come late and in any order, so each says of which stay it speaks, and what it says of
one that is over changes nothing for a later one. Whenever a replica asks what it is to let go of,
it also says which stays it has and how many it has begun; one that is among neither the former nor
those to come is over, whatever got lost. So a registry that was restarted is told, and one that is
mistaken is set right, after `POLL_S` at the latest. The replica that took a session last has it;
one that has died is not waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ray.exceptions import RayActorError

POLL_S = 10.0  # for which a replica waits to be asked for a session, before it asks again
LET_GO_S = 10.0  # for a replica to save a conversation and let go of it
ALIVE_S = 0.2  # between two looks whether a replica that is asked has died
log = logging.getLogger(__name__)


class Stay(NamedTuple):
    """That a replica has a session: until it is gone, and not once it has come back."""

    replica: str
    number: int  # counted by the replica, from 1


@dataclass(eq=False)
class _Request:
    """That a session be let go of; somebody waits for it."""

    key: str
    stay: Stay
    done: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class _Replica:
    handle: Any  # its actor
    asked: asyncio.Queue[_Request] = field(default_factory=asyncio.Queue)

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
        self._owners: dict[str, Stay] = {}
        self._waited: set[_Request] = set()  # for which somebody still waits

    async def asked(
        self, replica: str, handle: Any, held: dict[str, int], begun: int
    ) -> tuple[str, int] | None:
        """Wait for a session that a replica is to let go of.

        Args:
            handle: of its actor.
            held: the number of its stay by the key of each session that it has.
            begun: how many stays it has begun.

        Returns:
            its key and the number of the stay, or nothing: ask again.
        """
        if replica not in self._replicas:
            await self._forget_the_dead()
            self._replicas[replica] = _Replica(handle)
        self._told(replica, held, begun)
        asked = self._replicas[replica].asked
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                while (request := await asked.get()) not in self._waited:
                    pass  # it was answered too late: the session may be back by now
                return request.key, request.stay.number
        return None

    async def take(self, key: str, replica: str, number: int) -> None:
        """A replica begins or takes up a session; returns once no other goes on with it."""
        stay, before = Stay(replica, number), self._owners.get(key)
        if before is not None and before.replica == replica:
            self._owners[key] = max(before, stay)
            return
        self._owners[key] = stay
        if before is not None and (owner := self._replicas.get(before.replica)):
            request = _Request(key, before)
            self._waited.add(request)
            try:
                owner.asked.put_nowait(request)
                if not await _until(request.done, owner, LET_GO_S):
                    log.warning("replica %s does not let go of a session", before.replica)
            finally:
                self._waited.discard(request)

    async def left(self, key: str, replica: str, number: int) -> None:
        """A stay is over."""
        self._over(key, Stay(replica, number))

    def _told(self, replica: str, held: dict[str, int], begun: int) -> None:
        """Set right what is known of a replica."""
        known = [*self._owners.items(), *((each.key, each.stay) for each in self._waited)]
        for key, stay in known:
            if stay.replica == replica and stay.number <= begun and held.get(key) != stay.number:
                self._over(key, stay)
        for key, number in held.items():
            self._owners.setdefault(key, Stay(replica, number))

    def _over(self, key: str, stay: Stay) -> None:
        if self._owners.get(key) == stay:
            del self._owners[key]
        for request in [each for each in self._waited if each.stay == stay]:
            request.done.set()
            self._waited.discard(request)

    async def _forget_the_dead(self) -> None:
        names = list(self._replicas)
        alive = await asyncio.gather(*(each.alive() for each in self._replicas.values()))
        for name, there in zip(names, alive, strict=True):
            if not there:
                self._replicas.pop(name, None)
                for key in [key for key, stay in self._owners.items() if stay.replica == name]:
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
