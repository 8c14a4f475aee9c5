"""How a client is turned away, before it is connected and after."""

from __future__ import annotations

# Close codes: RFC 6455's, and one of ours where it has none.
GOING_AWAY, ABNORMAL, INVALID, VIOLATION, FAILED = 1001, 1006, 1007, 1008, 1011
TAKEN_OVER = 4001
MOVED = "the conversation goes on in another connection"


class RefusedError(Exception):
    """A client is turned away before it is connected.

    Args:
        status: of HTTP.
        reason: for the client and, as one word, for the metrics.
    """

    def __init__(self, status: int, word: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.word = status, word


class LostError(Exception):
    """Whatever codes a client's sound is gone, and with it what it had heard so far."""


class MalformedError(ValueError):
    """The sound that a client sent cannot be decoded, nor can anything after it."""
