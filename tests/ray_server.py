"""A server of two replicas under Ray Serve, and clients of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import ray
from ray import serve
from ray_support import descendants
from serving_support import Client, connected, until

from ttt_cache.session_file import read_session

SECRET = "secret"


class Two:
    """A server of two replicas."""

    def __init__(self, port: int, sessions: Path) -> None:
        self.port, self.sessions = port, sessions

    def url(self, session: str = "new", token: str = SECRET) -> str:
        return f"http://localhost:{self.port}/api/chat?session={session}&token={token}"

    def saved(self) -> list[int]:
        """Frames of each session on disk."""
        files = self.sessions.glob("[!.]*.safetensors")
        return sorted(int(read_session(file)[0]["rows.gen.offsets"]) for file in files)

    def whole(self) -> bool:
        """Whether both replicas serve; Serve takes a moment to see that one was killed."""
        deployed = serve.status().applications["ttt-cache"].deployments["replicas"]
        running = deployed.replica_states.get("RUNNING", 0)
        return running == len(descendants(os.getpid(), "ServeReplica")) == 2

    def owners(self) -> dict[str, str]:
        """Which replica has which conversation, as the registry knows it."""
        registry = ray.get_actor("registry of ttt-cache", namespace="ttt_cache")
        owners = ray.get(registry.__ray_call__.remote(lambda self: self._owners), timeout=10)
        return {key: stay.replica for key, stay in owners.items()}


@contextlib.asynccontextmanager
async def some(two: Two, count: int) -> AsyncIterator[list[Client]]:
    """So many conversations, on both replicas: which of them one gets is left to chance."""
    for _ in range(20):
        async with contextlib.AsyncExitStack() as stack:
            clients: list[Client] = []
            for _ in range(40):
                with contextlib.suppress(aiohttp.WSServerHandshakeError):  # that one is full
                    clients.append(await stack.enter_async_context(connected(two.url())))
                if len(clients) == count:
                    break
            if len(clients) == count and len(set(two.owners().values())) == 2:
                yield clients
                return
        await until(lambda: not two.owners())
    raise AssertionError("one of two replicas gets all")


async def ends(client: Client) -> int | None:
    """Wait until a connection is at its end; returns its close code."""
    with contextlib.suppress(TypeError, aiohttp.ClientError):
        await client.hear_for(20)
    return client.socket.close_code
