"""What the decode kernel is compiled for, and which part of what a query sees is whose."""

from __future__ import annotations

from dataclasses import dataclass

TILE = 4096  # numbers in a tile, 32 in each of 128 threads: four loads of 128 bits at 16 bits each
PROGRAMS = 256  # fewer leave multiprocessors idle: an H100 has 132, and each holds several


@dataclass(frozen=True)
class Sizes:
    """Everything that is known when the kernel is compiled; symbols as in `docs/semantics.md`.

    Fields only: a property's code would be no part of the key under which Triton keeps kernels.

    Attributes:
        heads, repeat, d: query heads H, query heads per key head R, their width D.
        ring, sinks: slots of the ring, W, and of the sinks, S.
        slots, e: virtual tokens M, 0 for none, and the width of their latents, E.
        recent: tokens kept exactly, N.
        leaving: tokens that leave the window together.
        written: executed tokens from which on the memory is read.
        gate: its kind.
        rope: `interleaved`, `halves` or `none`.
        block_d, block_e: the powers of two that hold d and e.
        lanes, block_m: slots of a tile of the ring, and of virtual tokens.
        span, parts: see `Split`.
        block_parts: the power of two that holds `parts`.
    """

    heads: int
    repeat: int
    d: int
    ring: int
    sinks: int
    slots: int
    e: int
    recent: int
    leaving: int
    written: int
    gate: str
    rope: str
    block_d: int
    block_e: int
    lanes: int
    block_m: int
    span: int
    parts: int
    block_parts: int


@dataclass(frozen=True)
class Split:
    """How programs share what a query sees.

    Attributes:
        lanes: slots of a tile.
        span: slots of the ring that a program takes, a multiple of `lanes`.
        parts: programs for a query. The last takes sinks and virtual tokens; where the ring is
            split it takes nothing else.
    """

    lanes: int
    span: int
    parts: int

    @classmethod
    def of(cls, queries: int, capacity: int, head_dim: int, beside: bool) -> Split:
        """Chosen from shapes alone: a CUDA graph holds it for good.

        Args:
            queries: rows times query heads.
            capacity: slots of the ring, W.
            beside: whether there are sinks or virtual tokens.
        """
        lanes = min(TILE // power_of_2(head_dim), power_of_2(capacity))
        tiles = pieces(capacity, lanes)
        span = pieces(tiles, min(pieces(PROGRAMS, queries), tiles)) * lanes
        spans = pieces(capacity, span)
        return cls(lanes, span, 1 if spans == 1 else spans + beside)


def pieces(length: int, size: int) -> int:
    """How many pieces of a size it takes to cover a length."""
    return -(-length // size)


def power_of_2(least: int) -> int:
    """The first power of two that is not below `least`."""
    return 1 << (least - 1).bit_length()
