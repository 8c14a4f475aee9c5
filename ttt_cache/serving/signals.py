"""What ends a server."""

from __future__ import annotations

import asyncio
import signal


async def signalled(tidy: bool = False) -> None:
    """Wait for SIGINT or SIGTERM. A second one ends the process at once.

    Args:
        tidy: a second SIGINT is a `KeyboardInterrupt`, for a program that must then end others. It
            waits for what threads are doing, which may be a write to a disk that hangs.
    """
    loop, came = asyncio.get_running_loop(), asyncio.Event()
    both = (signal.SIGINT, signal.SIGTERM)
    for each in both:
        loop.add_signal_handler(each, came.set)
    await came.wait()
    for each in both:
        loop.remove_signal_handler(each)
    if not tidy:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
