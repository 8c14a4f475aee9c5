"""Conversations on disk, each under a name that only its client knows."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import make_folder
from ..session_file import read_session, write_session

if TYPE_CHECKING:
    from .engine import Session

NAME = re.compile(r"[A-Za-z0-9_-]{32}")
FILE = re.compile(r"([0-9a-f]{64})(?:\.(\d+))?\.safetensors")
HALF = re.compile(r"\.[a-z0-9_]{8}\.safetensors")  # written, as `write_whole` calls it
BYTES = 24  # of chance in a name: 192 bits


class UnknownError(ValueError):
    """No session has that name."""


class TakenError(RuntimeError):
    """Another server has taken the session up."""


def new_name() -> str:
    """A name that cannot be guessed."""
    return secrets.token_urlsafe(BYTES)


def key(name: str) -> str:
    """What a session is called where its name must not be seen."""
    return hashlib.sha256(name.encode()).hexdigest()


class Sessions:
    """A folder of sessions, which several servers may share.

    Files are called by a hash of the name: no name becomes a path, and whoever sees the folder's
    listing cannot take up a conversation. A number after the hash counts how often the session was
    taken up: each time it moves to a new file, which only one server gets. So a server that was
    believed dead, and is not, never writes over what another one goes on with.

    Args:
        folder: made if it is not there, for its owner only.
        keep: seconds after which a session that nobody came back to is deleted.

    Raises:
        ValueError: `folder` cannot be written to, or has no hard links.
    """

    def __init__(self, folder: Path, keep: float) -> None:
        new = not folder.exists()
        make_folder("--sessions", folder)
        if new:
            folder.chmod(0o700)
        _check_links(folder)
        self.folder, self._keep = folder, keep

    def path(self, name: str) -> Path:
        """Where a session lies, or is to lie.

        Raises:
            UnknownError: it is no name that was ever given out.
        """
        if NAME.fullmatch(name) is None:
            raise UnknownError("no such session")
        return self._path(key(name), max(self._taken(key(name)), default=0))

    def first(self, name: str) -> Path:
        """Where a session that begins is to lie."""
        return self._path(key(name), 0)

    def take(self, name: str) -> tuple[Path, Session]:
        """Take a session up: whoever had it cannot write it any more; returns its new path, too.

        Raises:
            UnknownError: there is none.
            TakenError: another server took it up at this moment.
            ValueError: its file is damaged, and stays where it was.
        """
        before = self.path(name)
        hashed, taken = _parts(before)
        if not (there := self._taken(hashed)):
            raise UnknownError("no such session")
        path = self._path(hashed, taken + 1)
        try:
            os.utime(before)  # somebody came back: `expire` begins to count anew
            os.link(before, path)  # fails where the path is there: one server alone gets it
        except (FileExistsError, FileNotFoundError):
            raise TakenError("another server takes the session up") from None
        try:
            session = read_session(path)
        except BaseException as error:
            path.unlink()
            if isinstance(error, ValueError):  # it names the file that is gone again
                raise ValueError(str(error).replace(path.name, before.name)) from None
            raise
        for older in there:
            self._path(hashed, older).unlink(missing_ok=True)
        return path, session

    def write(self, path: Path, session: Session) -> int:
        """Write a session over the one that is there, whole or not at all; returns its bytes.

        Raises:
            TakenError: another server goes on with it.
            OSError: the disk does not take it.
        """
        hashed, taken = _parts(path)
        if max(self._taken(hashed), default=0) > taken:
            raise TakenError("another server goes on with the session")
        write_session(path, *session)
        return path.stat().st_size

    def expire(self) -> int:
        """Delete what nobody came back to, and what a kill left half written; returns how many.

        Nothing else that lies there is touched: an operator may have given a folder of weights.
        """
        deleted, oldest = 0, time.time() - self._keep
        for entry in list(os.scandir(self.folder)):
            with contextlib.suppress(FileNotFoundError):  # another server was faster
                ours = FILE.fullmatch(entry.name) or HALF.fullmatch(entry.name)
                if ours and entry.stat().st_mtime < oldest:
                    Path(entry).unlink()
                    deleted += 1
        return deleted

    def _path(self, hashed: str, taken: int) -> Path:
        return self.folder / f"{hashed}{f'.{taken}' if taken else ''}.safetensors"

    def _taken(self, hashed: str) -> list[int]:
        """How often a session was taken up, for each of its files."""
        names = [entry.name for entry in os.scandir(self.folder) if entry.name.startswith(hashed)]
        return [int(match[2] or 0) for match in map(FILE.fullmatch, names) if match]


def _check_links(folder: Path) -> None:
    """Make a hard link, as `Sessions.take` does; a kill meanwhile leaves what `expire` deletes."""
    suffix = ".safetensors"
    with tempfile.NamedTemporaryFile(prefix=".", suffix=suffix, dir=folder) as probe:
        link = folder / f".{secrets.token_hex(4)}{suffix}"
        try:
            os.link(probe.name, link)
        except OSError as error:
            message = f"--sessions must be on a file system with hard links, got {folder}"
            raise ValueError(f"{message}: {error.strerror}") from error
        link.unlink()


def _parts(path: Path) -> tuple[str, int]:
    """The hash in a session's path, and how often it was taken up."""
    match = FILE.fullmatch(path.name)
    assert match is not None, "made by _path"
    return match[1], int(match[2] or 0)
