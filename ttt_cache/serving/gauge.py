"""What one client may have the server hold of a message that does not end."""

from __future__ import annotations

import asyncio

MOST_HELD = 1024 * 1024  # bytes since the last whole message; what is read ahead is less


class Gauge(asyncio.Protocol):
    """Stands between a transport and aiohttp, which judges a message once all of it is there.

    A frame may announce 2^63 bytes. Whoever sends more than `MOST_HELD` without a whole message is
    dropped.
    """

    def __init__(self, handler: asyncio.Protocol, transport: asyncio.Transport) -> None:
        self._handler, self._transport, self._held = handler, transport, 0

    def whole(self) -> None:
        """A message was taken."""
        self._held = 0

    def data_received(self, data: bytes) -> None:
        self._held += len(data)
        if self._held > MOST_HELD:
            self._transport.abort()
        else:
            self._handler.data_received(data)

    def eof_received(self) -> bool | None:
        return self._handler.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._handler.connection_lost(exc)

    def pause_writing(self) -> None:
        self._handler.pause_writing()

    def resume_writing(self) -> None:
        self._handler.resume_writing()


def message_taken(transport: asyncio.Transport) -> None:
    """Tell the gauge of a connection, if it has one."""
    if isinstance(gauge := transport.get_protocol(), Gauge):
        gauge.whole()
