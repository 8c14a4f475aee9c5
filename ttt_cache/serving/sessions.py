"""Conversations on disk, each under a name that only its client knows."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import make_folder
from ..session_file import read_session, write_session

if TYPE_CHECKING:
    from .engine import Session

NAME = re.compile(r"[A-Za-z0-9_-]{32}")
BYTES = 24  # of chance in a name: 192 bits


class UnknownError(ValueError):
    """No session has that name."""


def new_name() -> str:
    """A name that cannot be guessed."""
    return secrets.token_urlsafe(BYTES)


class Sessions:
    """A folder of sessions.

    Files are called by a hash of the name: no name becomes a path, and whoever sees the folder's
    listing cannot take up a conversation.

    Args:
        folder: made if it is not there, for its owner only.
        keep: seconds after which a session that nobody came back to is deleted.

    Raises:
        ValueError: `folder` cannot be written to.
    """

    def __init__(self, folder: Path, keep: float) -> None:
        new = not folder.exists()
        make_folder("--sessions", folder)
        if new:
            folder.chmod(0o700)
        self.folder, self._keep = folder, keep

    def path(self, name: str) -> Path:
        """Where a session lies, or is to lie.

        Raises:
            UnknownError: it is no name that was ever given out.
        """
        if NAME.fullmatch(name) is None:
            raise UnknownError("no such session")
        return self.folder / f"{hashlib.sha256(name.encode()).hexdigest()}.safetensors"

    def read(self, name: str) -> tuple[Path, Session]:
        """A session and its path.

        Raises:
            UnknownError: there is none.
            ValueError: its file is damaged.
        """
        path = self.path(name)
        try:
            return path, read_session(path)
        except FileNotFoundError:
            raise UnknownError("no such session") from None

    def write(self, name: str, session: Session) -> int:
        """Write a session over the one that is there, whole or not at all; returns its bytes.

        Raises:
            OSError: the disk does not take it.
        """
        path = self.path(name)
        write_session(path, *session)
        return path.stat().st_size

    def expire(self) -> int:
        """Delete what nobody came back to, and what a kill left half written; returns how many."""
        deleted, oldest = 0, time.time() - self._keep
        for entry in list(os.scandir(self.folder)):
            if entry.name.endswith(".safetensors") and entry.stat().st_mtime < oldest:
                Path(entry).unlink(missing_ok=True)
                deleted += 1
        return deleted
