"""One writer per folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def only_writer(folder: Path, what: str) -> Iterator[None]:
    """Hold the folder's lock, which a killed process loses.

    Args:
        what: the folder holds, for the message.

    Raises:
        RuntimeError: another process has the lock.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"{folder}: another process is writing {what}") from None
        yield
