"""A process that codes Opus, as the server sees it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections import deque

from . import opus_worker as worker
from .errors import LostError

START_S, END_S = 30.0, 5.0  # that a process is given for its beginning, and for its end
NOT_STARTED = "a process that codes Opus cannot be started"


class Worker(asyncio.Protocol):
    """A process that codes for many conversations, as the server sees it.

    Attributes:
        coders: conversations that it codes for.
        lost: its end was seen.

    Raises:
        ValueError: it cannot be started.
    """

    def __init__(self) -> None:
        self.coders, self.lost = 0, asyncio.Event()
        try:
            self._socket, self.process = _spawn()
        except OSError as error:
            raise ValueError(f"{NOT_STARTED}: {error}") from None
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
            why = "" if self._socket.recv(1) == worker.READY else "it ended before it was ready"
        except OSError as error:
            why = str(error)
        if why:
            self.close()
            raise ValueError(f"{NOT_STARTED}: {why}")

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


def _spawn() -> tuple[socket.socket, subprocess.Popen]:
    """A process, and our end of its standard input."""
    ours, theirs = socket.socketpair()
    # Without -P, files beside the program would be taken for modules of Python's own. It needs no
    # threads.
    command = [sys.executable, "-P", worker.__file__]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    with theirs:
        try:
            return ours, subprocess.Popen(command, stdin=theirs.fileno(), env=environment)
        except BaseException:
            ours.close()
            raise
