"""Processes that code Opus for the server.

Coding a frame both ways takes more than a millisecond and holds Python's global lock, so that one
process could hold some 60 conversations, whatever its GPU. Handed to a worker, it costs the server
a twentieth of that.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os

from . import opus_worker as worker
from .opus import Opus
from .opus_process import Worker

FEW = 4  # conversations that are coded in the server itself
EACH = 32  # that keep a worker busy for half of the time: a frame waits for 20 ms on average
PAUSE_S = 5.0  # before another is tried to be started
log = logging.getLogger(__name__)


def workers_for(rows: int) -> int:
    """How many processes code for so many conversations; one core is left to the server."""
    cores = len(os.sched_getaffinity(0))
    return 0 if rows <= FEW else min(-(-rows // EACH), max(1, cores - 1))


class There:
    """A coder in a worker."""

    def __init__(self, process: Worker, number: int, rate: int) -> None:
        self._worker, self._number = process, number
        process.coders += 1
        process.tell(number, worker.OPEN, worker.RATE.pack(rate))

    async def encode(self, pcm: bytes) -> bytes:
        return await self._worker.ask(self._number, worker.ENCODE, pcm)

    async def decode(self, opus: bytes) -> bytes:
        return await self._worker.ask(self._number, worker.DECODE, opus)

    def close(self) -> None:
        self._worker.coders -= 1
        self._worker.tell(self._number, worker.CLOSE)


class Pool:
    """Workers, each of which keeps a conversation for its life; of none, all is coded here.

    Raises:
        ValueError: they cannot be started; none is left.
    """

    def __init__(self, count: int) -> None:
        self._workers: list[Worker] = []
        self._numbers = itertools.count()
        try:
            for _ in range(count):
                self._workers.append(Worker())
            for each in self._workers:  # which start meanwhile
                each.wait()
        except BaseException:
            self.close()
            raise

    def opus(self, rate: int, frame_size: int) -> Opus:
        """A codec of the least busy worker."""
        if not self._workers:
            return Opus(rate, frame_size)
        chosen = min(self._workers, key=lambda each: (each.lost.is_set(), each.coders))
        return Opus(rate, frame_size, There(chosen, next(self._numbers), rate))

    async def attach(self) -> None:
        """To the running loop, before the first codec is made."""
        for each in self._workers:
            await each.attach()

    async def keep(self) -> None:
        """Put a new worker in the place of each that ends, for ever."""
        await asyncio.gather(*(self._keep(place) for place in range(len(self._workers))))
        await asyncio.Event().wait()  # where there are none

    async def _keep(self, place: int) -> None:
        while True:
            before = self._workers[place]
            await before.lost.wait()
            before.close()
            log.error("a process that codes Opus ended with status %s", before.process.returncode)
            try:
                await self._start(place)
            except ValueError as error:
                log.error("%s", error)
                await asyncio.sleep(PAUSE_S)

    async def _start(self, place: int) -> None:
        started = Worker()
        try:
            await asyncio.to_thread(started.wait)
            await started.attach()
        except BaseException:  # the server ends, too
            started.close()
            raise
        self._workers[place] = started

    def close(self) -> None:
        """End all workers."""
        for each in self._workers:
            each.close()
