"""Results on disk, under what made them: an interrupted evaluation goes on, nothing is stale."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from rich.console import Console

from ttt_cache.files import write_whole

from .circumstances import versions


def key_of(made: Mapping[str, Any]) -> str:
    """A file name for what a result depends on; any difference gives another one."""
    text = json.dumps(made, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Kept(NamedTuple):
    """A result on disk.

    Attributes:
        result: plain JSON values.
        date: when it was measured, UTC, ISO 8601.
    """

    result: dict[str, Any]
    date: str


class Results:
    """One JSON file for each result, in `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def get(self, made: Mapping[str, Any]) -> Kept | None:
        """The result that was made so; `None` if there is none.

        Raises:
            ValueError: its file is damaged.
        """
        path = self._path(made)
        return _read(path) if path.exists() else None

    def put(self, made: Mapping[str, Any], result: dict[str, Any], seconds: float) -> Kept:
        """Keep a result of plain JSON values, which took `seconds`."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        held = {"made": made, "versions": versions(), "date": date}
        held |= {"seconds": round(seconds, 2), "result": result}
        text = json.dumps(held, indent=1, allow_nan=False)
        write_whole({self._path(made): lambda path: path.write_text(text + "\n", "utf-8")})
        return Kept(result, date)

    def _path(self, made: Mapping[str, Any]) -> Path:
        return self.folder / f"{key_of(made)}.json"


def _read(path: Path) -> Kept:
    """Files are written whole, so a damaged one was damaged by somebody: that is said, and not
    measured over."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        kept = Kept(held["result"], held["date"])
        if key_of(held["made"]) != path.stem or not isinstance(kept.result, dict):
            raise ValueError
        datetime.fromisoformat(kept.date)
    except (KeyError, TypeError, ValueError):  # of which those of JSON and of UTF-8 are kinds
        raise ValueError(
            f"{path} is damaged; delete it, and the same command measures what it held again"
        ) from None
    return kept


@contextmanager
def lock(
    path: Path, wait: bool = True, say: Callable[[str], object] | None = None
) -> Iterator[bool]:
    """Hold a lock that a killed process loses, so that two processes do not do the same.

    Args:
        wait: until another process is done with it.
        say: is told of that; a line on stderr by default.

    Yields:
        whether it is held; False only without `wait`, where another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        held = _try(file)
        if wait and not held:
            say = say or Console(stderr=True).print
            say(f"Waiting for another process, which works on the same: {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield held or wait


def _try(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
