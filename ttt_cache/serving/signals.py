"""What ends a server."""

from __future__ import annotations

import asyncio
import signal


async def signalled() -> None:
    """Wait for SIGINT or SIGTERM. A second one ends the process at once.

    By the system, that is: Python's own way would wait for what its threads are doing, which may be
    a write to a disk that hangs.
    """
    loop, came = asyncio.get_running_loop(), asyncio.Event()
    both = (signal.SIGINT, signal.SIGTERM)
    for each in both:
        loop.add_signal_handler(each, came.set)
    await came.wait()
    for each in both:
        loop.remove_signal_handler(each)
        signal.signal(each, signal.SIG_DFL)
