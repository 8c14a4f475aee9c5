"""How a server's log looks."""

from __future__ import annotations

import logging


def log_lines() -> None:
    """Give every line on stderr its time and level, unless the program has its own way with logs.

    For a process that serves, not for the library: it is the root logger that is changed.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
