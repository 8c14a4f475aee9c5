"""Results on disk, under what made them: an interrupted evaluation goes on, nothing is stale."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ttt_cache.files import write_whole


def key_of(made: Mapping[str, Any]) -> str:
    """A file name for what a result depends on; any difference gives another one."""
    text = json.dumps(made, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Results:
    """One JSON file for each result, in `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def get(self, made: Mapping[str, Any]) -> Any:
        """The result that was made so; `None` if there is none."""
        path = self._path(made)
        return json.loads(path.read_text(encoding="utf-8"))["result"] if path.exists() else None

    def put(self, made: Mapping[str, Any], result: Any, seconds: float) -> None:
        """Keep a result of plain JSON values, which took `seconds`."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        held = {"made": made, "date": date, "seconds": round(seconds, 2), "result": result}
        text = json.dumps(held, indent=1, allow_nan=False)
        write_whole({self._path(made): lambda path: path.write_text(text + "\n", "utf-8")})

    def _path(self, made: Mapping[str, Any]) -> Path:
        return self.folder / f"{key_of(made)}.json"


@contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock that a killed process loses, so that two processes do not do the same.

    Yields:
        whether it is held; False only without `wait`, where another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
