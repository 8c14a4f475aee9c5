"""What ends a server."""

from __future__ import annotations

import asyncio
import signal


async def signalled() -> None:
    """Wait for SIGINT or SIGTERM. A second one ends the process at once."""
    loop, came = asyncio.get_running_loop(), asyncio.Event()
    both = (signal.SIGINT, signal.SIGTERM)
    for each in both:
        loop.add_signal_handler(each, came.set)
    await came.wait()
    for each in both:
        loop.remove_signal_handler(each)
