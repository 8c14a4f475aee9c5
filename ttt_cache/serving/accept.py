"""How strangers come in: a few at a time, so that those who talk go first.

What a connection costs before it is a conversation is paid by the thread that serves the
conversations. So new ones are taken one by one, `PACE_S` apart; the others wait in the kernel's
queue, which costs nothing. One that does not say what it wants is dropped, and when too many are
open, the oldest such one makes room: silence cannot keep others out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from functools import partial

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from .gauge import Gauge
from .neighbours import Alone, Neighbours, Room

PACE_S = 0.01  # between two new connections at one address; a refusal costs 1 ms
REQUEST_S = 10.0  # for a request to be whole, with the handshake of TLS
ANSWER_S = 30.0  # from then until it is answered, and that is read, or talks
REQUEST_BYTES = 16 * 1024
MARGIN = 256  # connections beyond those that talk
WAITING = 128  # in the kernel's queue
# A conversation in plain samples is 48 kB/s. What the kernel would hold for a client that does not
# read, 4 MB and more, hides for minutes that it does not; what it reads at a time is one callback.
SOCKET_BYTES = 64 * 1024
LEAVE_S = 1.0  # for a client to take leave of TLS; till then it counts as a connection
BROKEN_S = 1.0  # before the next attempt, when the system has no more sockets
MOST_HANDED = 8  # times that a connection goes from neighbour to neighbour
log = logging.getLogger(__name__)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Door:
    """Listens, and gives each connection to aiohttp once its request is whole.

    A connection makes one request: what it sends behind it is not read before the answer to it is
    a websocket, whose handler calls `resume_reading` of the transport.

    Args:
        listeners: bound sockets.
        rows: conversations at once.
        neighbours: at the same port.
        free: how many more conversations there can be; neighbours are told.
    """

    def __init__(
        self,
        application: web.Application,
        listeners: list[socket.socket],
        rows: int,
        context: ssl.SSLContext | None = None,
        neighbours: Neighbours | None = None,
        free: Callable[[], int] = lambda: 1,
    ) -> None:
        application.middlewares.append(self._asked)
        application.on_response_prepare.append(self._answered)  # type: ignore[arg-type]
        faults = log.getChild("faults")
        faults.addFilter(_ours)
        self._runner = web.AppRunner(
            application, access_log=None, logger=faults, shutdown_timeout=5, lingering_time=0
        )
        self._listeners, self._most, self._context = listeners, rows + MARGIN, context
        self._neighbours, self._free = neighbours or Alone(), free
        self._accepting: list[asyncio.Task[None]] = []
        self._strangers: dict[asyncio.Task[None], None] = {}  # the oldest first
        self._handed_on: set[asyncio.BaseTransport] = set()  # whose request is not yet judged
        self._ends: dict[asyncio.BaseTransport, asyncio.TimerHandle] = {}  # of those that ask

    async def open(self) -> list[asyncio.Task[None]]:
        """Listen; returns what lets connections in, for ever."""
        await self._runner.setup()
        for each in self._listeners:
            for kind in (socket.SO_RCVBUF, socket.SO_SNDBUF):  # of what is accepted, too
                each.setsockopt(socket.SOL_SOCKET, kind, SOCKET_BYTES)
            each.setblocking(False)
            each.listen(WAITING)
            self._accepting.append(asyncio.ensure_future(self._accept(partial(_newcomer, each))))
        self._neighbours.open(self._room)
        self._accepting.append(asyncio.ensure_future(self._accept(self._neighbours.taken)))
        return self._accepting

    async def close(self) -> None:
        """Stop listening, and end every connection."""
        tasks = [*self._accepting, *self._strangers]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for each in self._listeners:
            each.close()
        self._neighbours.close()
        for each in self._ends.values():
            each.cancel()
        await self._runner.cleanup()

    @property
    def connections(self) -> int:
        """How many are open."""
        server = self._runner.server
        return len(self._strangers) + (len(server.connections) if server else 0)

    def _room(self) -> Room:
        """Who is at the door may want no conversation, or nothing: that shows once it has asked."""
        asking = sum(not each.is_closing() for each in self._handed_on)
        return Room(free := self._free(), free - len(self._strangers) - asking)

    async def _accept(self, come: Callable[[], Awaitable[tuple[socket.socket, int]]]) -> None:
        while True:
            try:
                connection, handed = await come()
            except OSError as error:  # too many open files, or the client has gone already
                log.warning("a connection could not be accepted: %s", error)
                await asyncio.sleep(BROKEN_S)
                continue
            if handed == MOST_HANDED or not self._neighbours.give(connection, handed + 1):
                self._let_in(connection)
            await asyncio.sleep(PACE_S)

    def _let_in(self, connection: socket.socket) -> None:
        if self.connections >= self._most:
            if not self._strangers:
                connection.close()
                return
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.cancel()
        task = asyncio.ensure_future(self._request(connection))
        self._strangers[task] = None
        task.add_done_callback(lambda task: self._strangers.pop(task, None))

    async def _request(self, connection: socket.socket) -> None:
        """Wait for a whole request, and hand it on."""
        reader, transport = asyncio.StreamReader(limit=REQUEST_BYTES), None
        try:
            # Whatever ends this: a broken handshake, time, no end of the headers, no more room.
            with contextlib.suppress(OSError, EOFError, asyncio.LimitOverrunError):
                async with asyncio.timeout(REQUEST_S):
                    transport = await self._connected(connection, reader)
                    request = await reader.readuntil(b"\r\n\r\n")
                reader.feed_eof()
                if not await reader.read() and not transport.is_closing():
                    self._hand_on(transport, request)
                    transport = None
        finally:
            if transport is not None:
                transport.abort()

    async def _connected(
        self, connection: socket.socket, reader: asyncio.StreamReader
    ) -> asyncio.Transport:
        transport, _ = await asyncio.get_running_loop().connect_accepted_socket(
            lambda: asyncio.StreamReaderProtocol(reader),
            connection,
            ssl=self._context,
            ssl_shutdown_timeout=LEAVE_S if self._context else None,
        )
        return transport

    def _hand_on(self, transport: asyncio.Transport, request: bytes) -> None:
        transport.pause_reading()
        assert self._runner.server is not None, "set up by open"
        handler = self._runner.server()
        transport.set_protocol(Gauge(handler, transport))
        handler.connection_made(transport)
        end = asyncio.get_running_loop().call_later(ANSWER_S, self._end, transport)
        self._ends[transport] = end
        self._handed_on.add(transport)
        self._strangers.pop(asyncio.current_task(), None)  # type: ignore[arg-type]
        handler.data_received(request)

    def _end(self, transport: asyncio.Transport) -> None:
        del self._ends[transport]
        self._handed_on.discard(transport)
        transport.abort()

    @web.middleware
    async def _asked(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """A request is judged, which takes its seat, if any, before anything else happens."""
        self._handed_on.discard(request.transport)  # type: ignore[arg-type]
        return await handler(request)

    async def _answered(self, request: web.Request, response: web.StreamResponse) -> None:
        """Let those stay that are to talk; whoever goes on asking would pass by the door."""
        if not isinstance(response, web.WebSocketResponse):
            response.force_close()
            response.headers["Connection"] = "close"
        elif end := self._ends.pop(request.transport, None):  # type: ignore[arg-type]
            end.cancel()


async def _newcomer(listener: socket.socket) -> tuple[socket.socket, int]:
    connection, _ = await asyncio.get_running_loop().sock_accept(listener)
    return connection, 0


def _ours(record: logging.LogRecord) -> bool:
    """Whether a fault is of interest to the operator, not what a stranger calls a request."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))
