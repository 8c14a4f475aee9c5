"""One model on one GPU, as a replica of a Serve deployment."""

from __future__ import annotations

import asyncio

from ray import serve

from ...launch import Refused
from ..host import Host
from ..logs import log_lines
from ..run import Work, prepare
from .export import Export
from .neighbours import Machine, meeting_place
from .others import Replicas

# Around what the operator is to read of a replica that does not begin: Ray passes on a traceback.
BEGIN, END = "<<ttt-cache:", ":ttt-cache>>"


class Replica:
    """Loads the model, then listens; Serve sends it no requests.

    Raises:
        RuntimeError: the folder of sessions or the model cannot be used; `refusal` finds why.
    """

    def __init__(self, work: Work) -> None:
        log_lines()
        here = serve.get_replica_context()
        replica, options = here.replica_id.unique_id, work.options
        self._others = Replicas(here.app_name, replica)
        name = f"{here.app_name} at {options.host}:{options.port}"
        try:
            neighbours = Machine(meeting_place(name), replica)
            server = prepare(work, self._others, neighbours)
        except (OSError, TypeError, ValueError, RuntimeError, Refused) as error:
            raise RuntimeError(f"{BEGIN}{error}{END}") from None
        self._stop = asyncio.Event()
        self._serving = asyncio.ensure_future(server.serve(self._told_to_end))

    async def check_health(self) -> None:
        """Raise what the model failed with, so that Serve replaces this replica."""
        if self._serving.done():
            self._serving.result()

    async def __del__(self) -> None:
        """Serve ends this replica: save and close every conversation."""
        self._stop.set()
        await asyncio.wait([self._serving])

    async def _told_to_end(self, host: Host) -> None:
        beside = (self._stop.wait(), self._others.run(host), Export(host.metrics).run())
        tasks = [asyncio.ensure_future(each) for each in beside]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            done.pop().result()  # a fault ends this replica, so that Serve replaces it
        finally:
            for task in tasks:
                task.cancel()


def refusal(said: str) -> str | None:
    """Why a replica did not begin, out of what Serve says; `None`: for no reason of ours."""
    _, found, rest = said.partition(BEGIN)
    return rest.partition(END)[0] if found else None
