"""Folders that can be written to, and files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path


def make_folder(name: str, folder: Path) -> None:
    """Make the folder of some results, before the time is spent that makes them.

    Args:
        name: of the option or argument, for the message.

    Raises:
        ValueError: it cannot be made, or not be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{name} must be a folder, got {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{name} must be a folder that can be written to, got {folder}")


def write_whole(writers: Mapping[Path, Callable[[Path], object]], mode: int = 0o644) -> None:
    """Write files that belong together.

    Each writer fills a temporary file beside its path. Only when all are complete and on the disk
    are they renamed into place, one after the other, so an error while writing changes nothing.

    Args:
        mode: who may read and write them.

    Raises:
        OSError: a path is there and no regular file, so that renaming would take its place.
    """
    temporary: dict[Path, Path] = {}
    # A link stays one: what it points to is written.
    places = {path.resolve(): write for path, write in writers.items()}
    for path in places:
        if path.exists() and not path.is_file():
            raise OSError(f"{path} is there and no regular file; nothing was written")
    try:
        for path, write in places.items():
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
            os.close(handle)
            temporary[path] = Path(name)
            write(temporary[path])
            with temporary[path].open("rb") as file:
                os.fsync(file.fileno())
            temporary[path].chmod(mode)
        for path, written in temporary.items():
            os.replace(written, path)
    finally:
        for left in temporary.values():
            left.unlink(missing_ok=True)
