"""A registry and replicas that speak through `registry_wire`.

The replicas' side of it is the real one; their hosts only know who is there. What must be true is
asserted while things happen, in `check`, which is to be called between any two, and in `settle`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from registry_wire import Handle, Wire
from serving_time import Turns

from ttt_cache.serving.cluster import others
from ttt_cache.serving.cluster.registry import Stay
from ttt_cache.serving.sessions import key

SAVED_S, HUNG_S = 0.5, 15.0  # for a conversation to be saved; a replica that hangs answers too late
SETTLED_S = 60.0  # whatever is slow has come, and every replica has asked twice


class Place:
    """A replica."""

    def __init__(self, name: str, wire: Wire, random: Random) -> None:
        self.name, self.handle, self._wire, self._random = name, Handle(), wire, random
        self.here: dict[str, asyncio.Event] = {}
        self._coming, self._ending = set[str](), set[str]()
        self._tasks = set[asyncio.Future]()
        context = SimpleNamespace(current_actor=self.handle)
        with (
            patch.object(others, "registry", lambda application: wire),
            patch.object(others, "ray", SimpleNamespace(get_runtime_context=lambda: context)),
        ):
            self.others = others.Replicas("", name)
            self.begin(self.others.run(self))  # type: ignore[arg-type]
            asyncio.get_event_loop().run_until_complete(asyncio.sleep(0))

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_event_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def die(self) -> None:
        self.handle.dead = True
        for each in [*self._tasks, *self.others._letting.values()]:
            each.cancel()

    @property
    def stays(self) -> dict[str, Stay]:
        """That it has, while it lives."""
        if self.handle.dead:
            return {}
        return {hashed: Stay(self.name, each) for hashed, each in self.others._stays.items()}

    async def come(self, name: str) -> None:
        """A client takes up a session, as `Admission` lets it."""
        if name in self._coming:
            return
        self._coming.add(name)
        try:
            await self.go(name)
            await self.others.take(name)
            await asyncio.sleep(self._random.uniform(0, SAVED_S))
            self.here[name] = asyncio.Event()
        finally:
            self._coming.discard(name)

    async def go(self, name: str) -> None:
        """A conversation ends, as `Host.leave` lets it."""
        if (ended := self.here.get(name)) is None:
            return
        if name not in self._ending:
            self._ending.add(name)
            longest = self._random.choice([SAVED_S, SAVED_S, HUNG_S])
            await asyncio.sleep(self._random.uniform(0, longest))
            self._ending.discard(name)
            del self.here[name]
            self.others.left(name)
            ended.set()
        await ended.wait()

    async def let_go(self, hashed: str) -> None:
        while any(key(name) == hashed for name in self._coming):
            await asyncio.sleep(0.05)
        for name in [name for name in self.here if key(name) == hashed]:
            if name not in self._ending:
                assert self.stays[hashed] in self._wire.told, "it was to let go of another"
            await asyncio.shield(asyncio.ensure_future(self.go(name)))
        await asyncio.sleep(self._random.uniform(0, HUNG_S))


class Cluster:
    """So many replicas; who dies is replaced by another one. Numbers that name them wrap around."""

    def __init__(self, replicas: int, seed: int) -> None:
        self.loop, random = Turns(), Random(seed)
        asyncio.set_event_loop(self.loop)
        self.wire, self._random, self._named = Wire(random), random, 0
        self.places: list[Place] = [self._place() for _ in range(replicas)]

    def _place(self) -> Place:
        self._named += 1
        return Place(f"replica {self._named}", self.wire, self._random)

    def come(self, place: int, name: str) -> None:
        self.places[place].begin(self.places[place].come(name))

    def go(self, place: int, name: str) -> None:
        self.places[place].begin(self.places[place].go(name))

    def kill(self, place: int) -> None:
        self.places[place].die()
        self.places[place] = self._place()

    def restart(self) -> None:
        self.wire.restart()

    def pass_time(self, seconds: float) -> None:
        self.loop.pass_time(seconds)
        self.check()

    @property
    def stays(self) -> dict[str, set[Stay]]:
        """Of those that live, by the session's key."""
        found: dict[str, set[Stay]] = {}
        for place in self.places:
            for hashed, stay in place.stays.items():
                found.setdefault(hashed, set()).add(stay)
        return found

    def check(self) -> None:
        assert not self.loop.complaints, self.loop.complaints
        for hashed, stay in self.wire.last.items():
            if stay in self.stays.get(hashed, ()):
                assert self.wire.registry._owners.get(hashed) == stay, "forgotten"

    def settle(self) -> None:
        """All has arrived."""
        self.pass_time(SETTLED_S)
        registry, names = self.wire.registry, {each.name for each in self.places}
        for hashed, stays in self.stays.items():
            owner = registry._owners[hashed]
            late = owner.replica not in names  # who died has taken it from another one
            assert owner in stays or late
        for hashed, stay in registry._owners.items():
            assert hashed in self.stays or stay.replica not in names, "nobody has that"
        assert not registry._waited and not any(each.others._letting for each in self.places)

    def close(self) -> None:
        left = asyncio.all_tasks(self.loop)
        for task in left:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        asyncio.set_event_loop(None)
        self.loop.close()
