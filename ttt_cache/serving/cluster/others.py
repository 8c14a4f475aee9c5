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
        self._letting: set[asyncio.Future[None]] = set()  # asyncio holds no task by itself

    async def take(self, name: str) -> None:
        try:
            async with asyncio.timeout(2 * LET_GO_S):
                await self._registry.take.remote(key(name), self._replica)
        except (RayError, TimeoutError) as error:
            log.warning("the registry is away, a session is taken up as it lies: %s", error)

    def left(self, name: str) -> None:
        self._registry.left.remote(key(name), self._replica)

    async def run(self, host: Host) -> None:
        """Do what the registry asks for, for ever."""
        handle = ray.get_runtime_context().current_actor
        while True:
            try:
                asked = await self._registry.asked.remote(self._replica, handle, host.keys)
            except RayError as error:
                log.warning("the registry is away: %s", error)
                await asyncio.sleep(AGAIN_S)
                continue
            if asked is not None:
                letting = asyncio.ensure_future(self._let_go(host, asked))
                self._letting.add(letting)
                letting.add_done_callback(self._letting.discard)

    async def _let_go(self, host: Host, hashed: str) -> None:
        try:
            await host.let_go(hashed)
        finally:
            self._registry.left.remote(hashed, self._replica)
