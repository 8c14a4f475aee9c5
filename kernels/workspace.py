"""How many programs share a query, and where they leave what they found for each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .inputs import Ring

TILE = 4096  # numbers in a tile, 32 in each of 128 threads: four loads of 128 bits at 16 bits each
PROGRAMS = 256  # fewer leave multiprocessors idle: an H100 has 132, and each holds several


@dataclass(frozen=True)
class Split:
    """Which part of what a query sees is whose.

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


@dataclass(frozen=True)
class Workspace:
    """No part of the state: what is in it between two launches is zero or does not matter.

    Attributes:
        split: of each query.
        rows, heads: tickets, int32 `[B]` and `[B, H]`, zero between launches.
        sums, totals: softmaxes of the parts, float32 `[B, H, PARTS, 2]` and `[B, H, PARTS, D]`.
        virtual, mixes: those over virtual tokens, float32 `[B, H, 2]` and `[B, H, E]`.
    """

    split: Split
    rows: Tensor
    heads: Tensor
    sums: Tensor
    totals: Tensor
    virtual: Tensor
    mixes: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """All but the split, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    @classmethod
    def of(cls, ring: Ring, heads: int, latent_dim: int) -> Workspace:
        """For a ring, query heads H and latents of width E, 0 where no memory is read."""
        batch, _, capacity, head_dim = ring.keys.shape
        beside = bool(latent_dim or ring.sink_keys.shape[2])
        split = Split.of(batch * heads, capacity, head_dim, beside)
        device = ring.keys.device
        queries = (batch, heads) if split.parts > 1 else (0, 0)
        return cls(
            split,
            rows=torch.zeros(batch, dtype=torch.int32, device=device),
            heads=torch.zeros(queries, dtype=torch.int32, device=device),
            sums=torch.empty(*queries, split.parts, 2, device=device),
            totals=torch.empty(*queries, split.parts, head_dim, device=device),
            virtual=torch.empty(*queries, 2, device=device),
            mixes=torch.empty(*queries, latent_dim, device=device),
        )


def pieces(length: int, size: int) -> int:
    """How many pieces of a size it takes to cover a length."""
    return -(-length // size)


def power_of_2(least: int) -> int:
    """The first power of two that is not below `least`."""
    return 1 << (least - 1).bit_length()
