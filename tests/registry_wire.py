"""A registry as replicas see it: in made-up time, with messages that may come late."""

from __future__ import annotations

import asyncio
from random import Random
from types import SimpleNamespace
from typing import Any

from ray.exceptions import RayActorError

from ttt_cache.serving.cluster.registry import Registry, Stay

QUICK_S, SLOW_S = 0.02, 3.0  # for a message to arrive


class Handle:
    """An actor: what the registry knows of a replica's life."""

    def __init__(self) -> None:
        self.dead = False
        self.__ray_ready__ = self

    async def remote(self) -> None:
        if self.dead:
            raise RayActorError


class Wire:
    """The registry's actor, as replicas see it."""

    def __init__(self, random: Random) -> None:
        self._random, self._working = random, set[asyncio.Task]()
        self.told: set[Stay] = set()  # that they are to be let go of
        self.restart()

    def restart(self) -> None:
        """What it has begun fails, what is on the way comes to the new one."""
        for each in self._working:
            each.cancel()
        self.registry = Registry()
        self.waiting: list[Stay | None] = []  # stays that somebody waits for
        self.last: dict[str, Stay] = {}  # that it was told of

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *args: self._send(method, args))

    def _send(self, method: str, args: tuple) -> asyncio.Future:
        carried = asyncio.ensure_future(self._carry(method, args))
        answer = asyncio.shield(carried)  # who does not wait for it ends nothing
        for each in (carried, answer):
            each.add_done_callback(lambda done: done.cancelled() or done.exception())
        return answer

    async def _carry(self, method: str, args: tuple) -> Any:
        await asyncio.sleep(self._delay())
        working = asyncio.ensure_future(getattr(self, f"_{method}")(*args))
        self._working.add(working)
        working.add_done_callback(self._working.discard)
        await asyncio.wait([working])
        await asyncio.sleep(self._delay())
        if working.cancelled():
            raise RayActorError
        return working.result()

    def _delay(self) -> float:
        return self._random.uniform(0, self._random.choice([0, QUICK_S, QUICK_S, SLOW_S]))

    async def _take(self, hashed: str, *stay: Any) -> None:
        before, waiting = self.registry._owners.get(hashed), self.waiting
        last = self.last.get(hashed)
        self.last[hashed] = Stay(*stay)
        if last and last.replica == self.last[hashed].replica:
            self.last[hashed] = max(last, self.last[hashed])
        waiting.append(before)
        try:
            await self.registry.take(hashed, *stay)
        finally:
            waiting.remove(before)

    async def _left(self, *stay: Any) -> None:
        await self.registry.left(*stay)

    async def _asked(self, replica: str, *more: Any) -> Any:
        asked = await self.registry.asked(replica, *more)
        if asked is not None:
            stay = Stay(replica, asked[1])
            assert stay in self.waiting, "nobody waits for that"
            self.told.add(stay)
        return asked
