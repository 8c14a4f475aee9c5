"""One model on one GPU, as a replica of a Serve deployment."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from ray import serve
from starlette.applications import Starlette
from starlette.routing import Mount

from ...launch import Refused, say
from ..run import Work
from ..service import Service, start
from ..sessions import Sessions
from .asgi import Asgi
from .export import Export
from .others import Replicas

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

# Around what the operator is to read of a replica that does not begin: Ray passes on a traceback.
BEGIN, END = "<<ttt-cache:", ":ttt-cache>>"


class Replica:
    """Loads the model, then answers what `application` has routes for.

    Raises:
        RuntimeError: the folder of sessions or the model cannot be used; `refusal` finds why.
    """

    def __init__(self, work: Work) -> None:
        options, here = work.options, serve.get_replica_context()
        try:
            sessions = options.store()
            model = start(work.files, work.install, options.rows)
        except (OSError, TypeError, ValueError, RuntimeError, Refused) as error:
            raise RuntimeError(f"{BEGIN}{error}{END}") from None
        self._others = Replicas(here.app_name, here.replica_id.unique_id)
        self._service = Service(model, sessions, options.save_every, self._others)
        web = Asgi(self._service.host, options.limits, options.token)
        self.application = web.application()
        self._tasks = [
            asyncio.ensure_future(self._serve()),
            asyncio.ensure_future(Export(self._service.metrics).run()),
        ]

    async def check_health(self) -> None:
        """Raise what the model failed with, so that Serve replaces this replica."""
        if self._tasks[0].done():
            self._tasks[0].result()

    async def _serve(self) -> None:
        await self._service.run(asyncio.ensure_future(self._told_to_end()))
        self._others.stopped()

    async def _told_to_end(self) -> None:
        await self._others.run(self._service.host)
        say(f"stopping; conversations that end: {self._service.host.conversations}")


def refusal(said: str) -> str | None:
    """Why a replica did not begin, out of what Serve says; `None`: for no reason of ours."""
    _, found, rest = said.partition(BEGIN)
    return rest.partition(END)[0] if found else None


def entrance() -> Starlette:
    """What Serve calls; it wants an application before there is a replica."""
    return Starlette(routes=[Mount("/", _to_the_replica)])


async def _to_the_replica(scope: Scope, receive: Receive, send: Send) -> None:
    replica: Any = serve.get_replica_context().servable_object
    await replica.application(scope, receive, send)
