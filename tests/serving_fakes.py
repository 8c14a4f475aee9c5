"""What stands for the ends of a server in its fuzz: model, disk, and connections."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from launch_files import FRAME, RATE

from ttt_cache.serving.engine import Answer, FullError
from ttt_cache.serving.errors import FAILED, GOING_AWAY, INVALID, TAKEN_OVER, VIOLATION
from ttt_cache.serving.pcm import SCALE
from ttt_cache.serving.sessions import UnknownError

FOREIGN, UNKNOWN = "f" * 32, "u" * 32  # names of sessions
BYTES = 2 * FRAME  # of a frame in plain samples
OURS = {GOING_AWAY, INVALID, VIOLATION, FAILED, TAKEN_OVER}  # docs/serving.md


def number_in(sound: bytes) -> int:
    """What a frame that begins so is known by, 0 to 15,999."""
    return int.from_bytes(sound[:2], "little", signed=True) % 16_000


def answer_to(history: list[int]) -> Answer | None:
    """What a conversation of these frames is answered last; it tells all that it was about."""
    if len(history) == 1:
        return None  # the model's delay
    told = sum(at * number for at, number in enumerate(history, 1)) % 16_000
    pcm = np.zeros(FRAME, np.float32)
    pcm[:3] = (np.array([history[-1], len(history), told]) + 0.25) / SCALE
    return Answer(pcm, 4 + told % 50)


class Rows:
    """An engine whose rows remember what they heard; whoever mixes them is found out.

    Attributes:
        heard: of each row that is taken, its frames' numbers.
        left: what a row had heard when it was left, by its conversation's name.
        fails: every step does, from now on.
        refuses: what is resumed.
    """

    frame_size, mimi = FRAME, SimpleNamespace(sample_rate=RATE)

    def __init__(self, rows: int) -> None:
        self.rows, self.fails, self.failed, self.refuses = rows, False, False, False
        self.heard: dict[int, list[int]] = {}
        self.names: dict[int, str] = {}
        self.left: dict[str, list[int]] = {}

    @property
    def free(self) -> int:
        return self.rows - len(self.heard)

    def state_bytes(self) -> int:
        return 100 * self.rows

    def join(self) -> int:
        free = [row for row in range(self.rows) if row not in self.heard]
        if not free:
            raise FullError
        self.heard[free[0]] = []
        return free[0]

    def resume(self, path: Path, session: list[int] | None) -> int:
        if session is None or self.refuses:
            raise ValueError("of another model")
        row = self.join()
        self.heard[row] = list(session)
        return row

    def leave(self, row: int) -> None:
        heard = self.heard.pop(row)
        if row in self.names:
            self.left[self.names.pop(row)] = heard

    def age(self, row: int) -> int:
        return len(self.heard[row])

    def session(self, row: int) -> list[int] | None:
        return None if self.failed else list(self.heard[row])

    def step(self, frames: dict[int, np.ndarray]) -> dict[int, Answer | None]:
        for row, frame in frames.items():
            self.heard[row].append(round(float(frame[0]) * SCALE) % 16_000)
        if self.fails:
            self.failed = True
            raise RuntimeError("the device is lost")
        return {row: answer_to(self.heard[row]) for row in frames}


class Disk:
    """Sessions in memory.

    Attributes:
        full, broken: it cannot be written to, cannot be read or cleaned.
        behind: names of which something could not be written.
    """

    def __init__(self) -> None:
        self.kept: dict[str, list[int] | None] = {FOREIGN: None}
        self.full = self.broken = False
        self.behind: set[str] = set()

    def first(self, name: str) -> Path:
        return Path(name)

    def take(self, name: str) -> tuple[Path, Any]:
        if self.broken:
            raise PermissionError("no")
        if name not in self.kept:
            raise UnknownError("no such session")
        return Path(name), self.kept[name]

    def write(self, path: Path, session: list[int]) -> int:
        name = str(path)
        if self.full:
            self.behind.add(name)
            raise OSError("no space left")
        self.behind.discard(name)
        self.kept[name] = session
        return len(session)

    def expire(self) -> int:
        if self.broken:
            raise FileNotFoundError("no")
        return 0


class Neighbours:
    """Other servers that share the sessions: what this one leaves is to be on the disk."""

    def __init__(self, engine: Rows, disk: Disk) -> None:
        self._engine, self._disk = engine, disk

    async def take(self, name: str) -> None:
        """None of them has it."""

    def left(self, name: str) -> None:
        heard = self._engine.left.get(name)
        if heard and name not in self._disk.behind and not self._engine.failed:
            assert self._disk.kept.get(name) == heard, "left before it was saved"


class FakePeer:
    """A connection; what the server does with it is looked at.

    Attributes:
        got: messages that were sent to it and read.
        code: that it was closed with; `aborted`: it was dropped.
    """

    def __init__(self) -> None:
        self.got: list[bytes] = []
        self.code: int | None = None
        self.gone = self.aborted = False
        self.reads = asyncio.Event()
        self.reads.set()
        self._sent: asyncio.Queue[bytes | int | None] = asyncio.Queue()

    def put(self, message: bytes | int | None) -> None:
        """What the server receives next; an int: the client closes; `None`: it is gone."""
        self._sent.put_nowait(message)

    def vanish(self) -> None:
        self.gone = True
        self.put(None)
        self.reads.set()  # what waits fails

    async def receive(self) -> bytes | int:
        message = await self._sent.get()
        if message is None:
            raise ConnectionResetError
        return message

    async def send(self, message: bytes) -> None:
        assert self.code is None, "nothing is sent after the close"
        await self._written()
        self.got.append(message)

    async def close(self, code: int, reason: str) -> None:
        assert code in OURS and len(reason.encode()) <= 123
        await self._written()
        self.code = code

    async def _written(self) -> None:
        if not self.gone:
            await self.reads.wait()
        if self.gone:
            raise ConnectionResetError

    def abort(self) -> None:
        self.aborted = True
