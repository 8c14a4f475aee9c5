"""Servers that listen at the same port of a machine, to which newcomers can be handed."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import NamedTuple, Protocol


class Room(NamedTuple):
    """What a server has left.

    Args:
        free: conversations that could begin now.
        sure: that would still be free if everyone at its door began one; may be negative.
    """

    free: int
    sure: int

    @property
    def rank(self) -> tuple[bool, bool]:
        """The higher, the better for a newcomer."""
        return self.sure > 0, self.free > 0


class Neighbours(Protocol):
    """The other servers.

    The kernel gives a new connection to any of those that listen. Who has no room gives it to one
    that has, before anything is read of it, so that TLS begins where it is to stay.
    """

    def open(self, room: Callable[[], Room]) -> None:
        """Let them know how much room there is here, from now on."""
        ...

    def give(self, connection: socket.socket, handed: int) -> bool:
        """Hand a connection to a neighbour that has more room; returns whether there was one.

        Then it is closed here. Does not wait.

        Args:
            handed: how often it has been handed on, with this time.
        """
        ...

    async def taken(self) -> tuple[socket.socket, int]:
        """Wait for a connection that is handed to this server; returns how often it was, too."""
        ...

    def close(self) -> None:
        """Take nothing more."""
        ...


class Alone:
    """No neighbours."""

    def open(self, room: Callable[[], Room]) -> None:
        pass

    def give(self, connection: socket.socket, handed: int) -> bool:
        return False

    async def taken(self) -> tuple[socket.socket, int]:
        return await asyncio.Future()

    def close(self) -> None:
        pass
