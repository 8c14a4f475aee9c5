"""A replica's side of the registry."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray
from ray.exceptions import RayError

from ..host import Host
from ..sessions import key
from .registry import LET_GO_S, Registry

NAMESPACE = "ttt_cache"
AGAIN_S = 1.0  # until a registry is asked again that could not be reached
log = logging.getLogger(__name__)


def registry(application: str) -> Any:
    """The actor of an application, begun if it is not there; it outlives whoever began it."""
    return (
        ray.remote(Registry)
        .options(
            name=f"registry of {application}",
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            max_restarts=-1,
            num_cpus=0,
        )
        .remote()
    )


class Replicas:
    """The other replicas, as `Others` of a `Host`.

    Args:
        application: whose replicas they are.
        replica: this one's id.
    """

    def __init__(self, application: str, replica: str) -> None:
        self._registry, self._replica = registry(application), replica
        self._begun = 0
        self._stays: dict[str, int] = {}  # the number of each, by the session's key
        self._letting: dict[str, asyncio.Future[None]] = {}  # asyncio holds no task by itself

    async def take(self, name: str) -> None:
        hashed = key(name)
        self._begun += 1
        self._stays[hashed] = self._begun
        if letting := self._letting.pop(hashed, None):
            letting.cancel()  # the stay that it was to end is over; it might end this one
        try:
            async with asyncio.timeout(2 * LET_GO_S):
                await self._registry.take.remote(hashed, self._replica, self._begun)
        except (RayError, TimeoutError) as error:
            log.warning("the registry is away, a session is taken up as it lies: %s", error)

    def left(self, name: str) -> None:
        hashed = key(name)
        if (number := self._stays.pop(hashed, None)) is not None:
            self._registry.left.remote(hashed, self._replica, number)

    async def run(self, host: Host) -> None:
        """Do what the registry asks for, for ever."""
        handle = ray.get_runtime_context().current_actor
        while True:
            stays = dict(self._stays), self._begun
            try:
                asked = await self._registry.asked.remote(self._replica, handle, *stays)
            except RayError as error:
                log.warning("the registry is away: %s", error)
                await asyncio.sleep(AGAIN_S)
                continue
            if asked is not None:
                self._asked(host, *asked)

    def _asked(self, host: Host, hashed: str, number: int) -> None:
        if self._stays.get(hashed) != number:  # what was said of its end got lost, or is on its way
            self._registry.left.remote(hashed, self._replica, number)
        elif hashed not in self._letting:  # else that of the same stay goes on
            self._letting[hashed] = asyncio.ensure_future(self._let_go(host, hashed))

    async def _let_go(self, host: Host, hashed: str) -> None:
        try:
            await host.let_go(hashed)  # its `left` is the answer
        finally:
            if self._letting.get(hashed) is asyncio.current_task():
                del self._letting[hashed]
