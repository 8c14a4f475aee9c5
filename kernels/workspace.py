"""Where programs that share a query or a row leave what they found for each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .inputs import Ring
from .sizes import Split


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
