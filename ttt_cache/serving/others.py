"""Servers that share a folder of sessions, and ask each other to let go of one."""

from __future__ import annotations

from typing import Protocol


class Others(Protocol):
    """The other servers.

    They are asked so that a conversation moves with all that was said. That only one server writes
    it does not depend on their answer: see `Sessions`.
    """

    async def take(self, name: str) -> None:
        """This server begins or takes up a session; returns once no other goes on with it.

        If nobody answers it returns nevertheless, after some seconds.
        """
        ...

    def left(self, name: str) -> None:
        """This server does not go on with it any more, if it took it."""
        ...
