"""What fails again and again, in few lines of the log."""

from __future__ import annotations

import logging
import time

QUIET_S = 60.0  # between two lines that say that it fails


class Trouble:
    """Says when something begins to fail, once a minute that it still does, and when it works.

    What fails now and then and works in between is said as seldom.

    Args:
        fails: what to say of it, such as "a session could not be saved".
        works: the same, such as "sessions are saved again".
    """

    def __init__(self, log: logging.Logger, fails: str, works: str) -> None:
        self._log, self._fails, self._works = log, fails, works
        self._said_at = -QUIET_S
        self._said = False  # that it fails, and not yet that it works again
        self._more = 0  # failures since then

    def failed(self, why: Exception) -> None:
        """It failed once more."""
        if (now := time.monotonic()) - self._said_at < QUIET_S:
            self._more += 1
            return
        more = f" (and {self._more} times since this was last said)" if self._more else ""
        self._log.error("%s%s: %s", self._fails, more, why)
        self._said_at, self._said, self._more = now, True, 0

    def worked(self) -> None:
        """It did not."""
        if self._said:
            more = f" (after {self._more} more failures)" if self._more else ""
            self._log.warning("%s%s", self._works, more)
            self._said, self._more = False, 0
