"""The replicas of one machine, as `Neighbours` of each other.

Each has two files in a folder: a socket, at which it is given connections, and what room it has,
which it writes down. So whoever finds that all are full has read a few files, and makes no work
for the others, however many strangers come. What a file says may be `TELL_S` old: who is given a
connection looks again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import stat
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..accept import WAITING
from ..neighbours import Room
from .passing import listening, listens, receive, send

TELL_S = 0.02  # between two looks whether the room here has changed
BEAT_S = 0.5  # after which it is written though it has not
ALIVE_S = 2.0  # who has written nothing for so long is given nothing
ROOM = struct.Struct("<iid")  # free, sure, and when, in seconds of the machine's clock
ID_BYTES = 20  # of a replica's id, at most
PATH_BYTES = 107  # of a socket's path, at most


def meeting_place(server: str) -> Path:
    """A folder in which the replicas of a server find each other on a machine.

    Args:
        server: what tells it from any other on the machine.

    Raises:
        ValueError: others could open it, or its path is too long for a socket.
    """
    name = hashlib.sha256(server.encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"ttt-cache-{os.getuid()}-{name}"
    if len(os.fsencode(path)) + len("/.socket") + ID_BYTES > PATH_BYTES:
        raise ValueError(f"TMPDIR must be shorter: a socket cannot lie in {path}")
    with contextlib.suppress(FileExistsError):
        path.mkdir(0o700)
    there = path.lstat()
    mine = stat.S_ISDIR(there.st_mode) and there.st_uid == os.getuid()
    if not mine or there.st_mode & 0o077:
        raise ValueError(f"{path} must be a folder that this user alone can open; remove it")
    return path


class Machine:
    """The other replicas of this machine.

    Args:
        folder: made by `meeting_place`.
        replica: this one's id.
    """

    def __init__(self, folder: Path, replica: str) -> None:
        self._folder, self._replica = folder, replica
        self._undo = contextlib.ExitStack()
        self._told = Room(0, 0), 0.0  # and when

    def open(self, room: Callable[[], Room]) -> None:
        for file in self._folder.glob("*.room"):  # of those that were killed
            if not listens(self._socket(file.stem)):
                self._forget(file.stem)
        self._room = room
        self._listener = self._undo.enter_context(listening(self._socket(self._replica), WAITING))
        self._undo.callback(self._forget, self._replica)
        self._own = self._undo.enter_context(self._file(self._replica).open("wb", buffering=0))
        self._undo.callback(asyncio.ensure_future(self._keep_telling()).cancel)

    def close(self) -> None:
        self._undo.close()

    def give(self, connection: socket.socket, handed: int) -> bool:
        here = self._room()
        if here.sure > 0:
            return False
        self._tell(here)  # nobody is to give it back
        for there, replica in sorted(self._others(), key=_order, reverse=True):
            if there.rank <= here.rank:
                return False
            if send(self._socket(replica), connection, handed):
                return True
        return False

    async def taken(self) -> tuple[socket.socket, int]:
        return await receive(self._listener)

    async def _keep_telling(self) -> None:
        while True:
            self._tell(self._room())
            await asyncio.sleep(TELL_S)

    def _tell(self, room: Room) -> None:
        """Write down how much room there is here."""
        now, (told, at) = time.monotonic(), self._told
        if room != told or now - at > BEAT_S:
            with contextlib.suppress(OSError):  # a full disk: this one is given nothing
                os.pwrite(self._own.fileno(), ROOM.pack(*room, now), 0)
                self._told = room, now

    def _others(self) -> Iterator[tuple[Room, str]]:
        """What room each has that lives."""
        for file in self._folder.glob("*.room"):
            with contextlib.suppress(FileNotFoundError, struct.error):  # it goes or comes just now
                free, sure, at = ROOM.unpack(file.read_bytes())
                if file.stem != self._replica and time.monotonic() - at < ALIVE_S:
                    yield Room(free, sure), file.stem

    def _file(self, replica: str) -> Path:
        return self._folder / f"{replica}.room"

    def _socket(self, replica: str) -> Path:
        return self._folder / f"{replica}.socket"

    def _forget(self, replica: str) -> None:
        self._file(replica).unlink(missing_ok=True)
        self._socket(replica).unlink(missing_ok=True)


def _order(other: tuple[Room, str]) -> tuple[tuple[bool, bool], int]:
    room, _ = other
    return room.rank, room.sure
