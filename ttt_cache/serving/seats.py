"""Who is here, who is about to be, and how many more may come."""

from __future__ import annotations

from .conversation import Conversation
from .errors import MOVED, TAKEN_OVER, RefusedError


class Seats:
    """The rows of an engine as clients see them.

    Args:
        left: how many there are; all are free.

    Attributes:
        left: that nobody has, or is about to have.
        here: conversations by name.
        coming: names of sessions that are being taken up.
        stopping: nobody is let in any more.
    """

    def __init__(self, left: int) -> None:
        self.left, self.stopping = left, False
        self.here: dict[str, Conversation] = {}
        self.coming: set[str] = set()

    def refuse_if_stopping(self) -> None:
        """Raise `RefusedError` from the moment on when the server is told to end."""
        if self.stopping:
            raise RefusedError(503, "stopping", "the server is stopping")

    def claim(self, before: Conversation | None = None) -> None:
        """Take a seat: a row, before the model's thread has given one.

        Args:
            before: the same conversation with another client, which leaves its seat to this one.

        Raises:
            RefusedError: none is left.
        """
        if before is not None and before.seated:
            before.seated = False
            return
        if not self.left:
            raise RefusedError(503, "full", "all conversations are taken; try again later")
        self.left -= 1

    def give_back(self, conversation: Conversation) -> None:
        """Others may have a conversation's seat, unless it has none any more."""
        self.left += conversation.seated
        conversation.seated = False

    async def move(self, name: str) -> None:
        """End a conversation, if it is here, that goes on elsewhere; then it is on disk."""
        if before := self.here.get(name):
            before.end(TAKEN_OVER, MOVED)
            await before.ended.wait()
