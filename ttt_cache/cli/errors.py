"""What the user got wrong, in one sentence on stderr and with exit status 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

USAGE = 2  # the exit status of a user's error, as of typer's own
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def fail(message: str, status: int = USAGE) -> typer.Exit:
    """Say `message` on stderr; the caller raises what is returned."""
    typer.echo(f"ttt-cache: {message}", err=True)
    return typer.Exit(status)


@contextmanager
def refusals(prefix: str = "", *more: type[Exception]) -> Iterator[None]:
    """Turn what the library refuses into one sentence.

    It belongs around the calls that judge the user's input only, so that a fault of ours keeps
    its traceback.

    Args:
        prefix: goes before the message, where that does not name the option.
        more: exceptions to catch beside `TypeError`, `ValueError` and `RuntimeError`.
    """
    try:
        yield
    except (TypeError, ValueError, RuntimeError, *more) as error:
        raise fail(prefix + reason(error)) from None


def reason(error: BaseException) -> str:
    """What an error says, one line for each problem that it lists."""
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    return "\n".join(filter(None, lines)) or type(error).__name__
