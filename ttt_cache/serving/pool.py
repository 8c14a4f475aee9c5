"""Processes that code Opus for the server.

Coding a frame both ways takes more than a millisecond and holds Python's global lock, so that one
process could hold some 60 conversations, whatever its GPU. Handed to a worker, it costs the server
a twentieth of that.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import os
import socket
import subprocess
import sys
from collections import deque

from . import opus_worker as worker
from .errors import LostError
from .opus import Opus

FEW = 4  # conversations that are coded in the server itself
EACH = 32  # that keep a worker busy for half of the time: a frame waits for 20 ms on average
START_S, END_S, PAUSE_S = 30.0, 5.0, 5.0
log = logging.getLogger(__name__)


def workers_for(rows: int) -> int:
    """How many processes code for so many conversations; one core is left to the server."""
    cores = len(os.sched_getaffinity(0))
    return 0 if rows <= FEW else min(math.ceil(rows / EACH), max(1, cores - 1))


class Worker(asyncio.Protocol):
    """A process that codes for many conversations, as the server sees it.

    Attributes:
        coders: conversations that it codes for.
        lost: its end was seen.

    Raises:
        OSError: there is no room for another process.
    """

    def __init__(self) -> None:
        self.coders, self.lost = 0, asyncio.Event()
        self._socket, theirs = socket.socketpair()
        # Without -P, files beside the program would be taken for modules of Python's own; in a
        # session of its own it hears no Ctrl-C. sphn and numpy need no threads here.
        command = [sys.executable, "-P", worker.__file__]
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
        with theirs:
            self.process = subprocess.Popen(
                command, stdin=theirs, env=environment, start_new_session=True
            )
        self._transport: asyncio.WriteTransport | None = None
        self._asked: deque[asyncio.Future[bytes]] = deque()  # in the order of the answers to come
        self._came = bytearray()

    def wait(self) -> None:
        """Until it is ready.

        Raises:
            ValueError: it is not.
        """
        self._socket.settimeout(START_S)
        try:
            ready = self._socket.recv(1)
        except OSError as error:
            ready = str(error).encode()
        if ready != worker.READY:
            self.close()
            raise ValueError("a process that codes Opus cannot be started")

    async def attach(self) -> None:
        """To the running loop, before it is asked for anything."""
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_unix_connection(lambda: self, sock=self._socket)

    def data_received(self, data: bytes) -> None:
        self._came += data
        at, size = 0, worker.ANSWER.size
        while len(self._came) - at >= size:
            done, length = worker.ANSWER.unpack_from(self._came, at)
            if len(self._came) - at - size < length:
                break
            answer = bytes(self._came[at + size : at + size + length])
            at += size + length
            asked = self._asked.popleft()
            if asked.cancelled():
                continue
            if done:
                asked.set_result(answer)
            else:
                asked.set_exception(ValueError(answer.decode()))
        del self._came[:at]

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()
        for asked in self._asked:
            if not asked.done():
                asked.set_exception(LostError("the sound's coder has failed"))
        self._asked.clear()

    def tell(self, coder: int, kind: int, payload: bytes = b"") -> None:
        """Have a coder do something that is not answered."""
        if self._transport is not None and not self.lost.is_set():
            self._transport.write(worker.REQUEST.pack(coder, kind, len(payload)) + payload)

    async def ask(self, coder: int, kind: int, payload: bytes) -> bytes:
        """Have a coder do something.

        Raises:
            ValueError: it cannot.
            LostError: the process is gone.
        """
        if self.lost.is_set():
            raise LostError("the sound's coder has failed")
        asked = asyncio.get_running_loop().create_future()
        self._asked.append(asked)
        self.tell(coder, kind, payload)
        return await asked

    def close(self) -> None:
        """End the process, which waits for nothing but its socket."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # at once, which a transport does not
        (self._transport or self._socket).close()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


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
        OSError, ValueError: they cannot be started; none is left.
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
                started = await asyncio.to_thread(_started)
            except (OSError, ValueError) as error:
                log.error("%s", error)
                await asyncio.sleep(PAUSE_S)
                continue
            await started.attach()
            self._workers[place] = started

    def close(self) -> None:
        """End all workers."""
        for each in self._workers:
            each.close()


def _started() -> Worker:
    started = Worker()
    started.wait()
    return started
