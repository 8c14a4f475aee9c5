"""Bad input is told all at once: one run of the checks, one list of what to mend."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

SHOWN = 10


def check_each(items: Iterable[T], check: Callable[[T], R]) -> list[R]:
    """Check all items and return what the checks return.

    Raises:
        ValueError: at least one check raised `ValueError` or `OSError`; the message lists the first
            ten of what they said and counts the rest.
    """
    results: list[R] = []
    problems: list[str] = []
    for item in items:
        try:
            results.append(check(item))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if len(problems) > SHOWN:
        problems[SHOWN:] = [f"and {len(problems) - SHOWN} more"]
    if problems:
        raise ValueError("\n".join(problems))
    return results
