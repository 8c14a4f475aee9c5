"""Which level is next, and how many conversations were held in real time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .figures import Level

FINE = 8  # the gap that is left open, as a share: one in so many
MOST = 16_384
UNKNOWN = "unknown"
Held = Mapping[int, bool | None]  # whether each level was held; `None`: unknown


def most_held(held: Held) -> int:
    """The largest level below the smallest not known to be held; one above that was luck."""
    broke = min((n for n, was in held.items() if not was), default=MOST + 1)
    return max((n for n, was in held.items() if was and n < broke), default=0)


def verdict(held: Held) -> str:
    """How many were held, in words: a level of which nothing is known leaves it open."""
    best = most_held(held)
    if next((was for _, was in sorted(held.items()) if not was), False) is not None:
        return str(best)
    return f"at least {best}" if best else UNKNOWN


def following(held: Held) -> int | None:
    """Double until a level is not held, then halve the gap; `None`: it is small enough."""
    best = most_held(held)
    broke = min((n for n, was in held.items() if not was), default=None)
    if broke is None:
        return max(2 * best, 1) if best < MOST else None
    return (best + broke) // 2 if broke - best > max(best // FINE, 1) else None


def levels(clients: Sequence[int] | None, done: Sequence[Level]) -> Iterator[int]:
    """Those that were asked for, or the ramp; `done` grows meanwhile."""
    if clients is not None:
        yield from clients
        return
    while (number := following({level.clients: level.held for level in done})) is not None:
        yield number
