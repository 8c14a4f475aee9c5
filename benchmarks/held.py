"""What processes hold of the machine while they run."""

from __future__ import annotations

import psutil


def resident_mb(process: int | None = None) -> float:
    """Megabytes of memory that a process, by default this one, has in the machine's now."""
    return psutil.Process(process).memory_info().rss / 1e6


def open_files(process: int) -> int:
    """Its file descriptors."""
    return psutil.Process(process).num_fds()


def descendants(process: int) -> list[int]:
    """What it has begun, and what those have."""
    return [each.pid for each in psutil.Process(process).children(recursive=True)]
