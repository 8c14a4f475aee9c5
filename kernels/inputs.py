"""What the kernels and their references are given: tensors by name, and settings of a layer.

Symbols are those of `docs/semantics.md`: B rows, H query heads on Hkv key heads of width D, a ring
of W slots, S sinks, M virtual tokens read as latents of width E.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

GATES = ("joint", "fixed", "layer", "head", "query", "residual")


@dataclass(frozen=True)
class Layer:
    """Settings of one layer.

    Attributes:
        recent: tokens kept exactly, N.
        chunk: tokens that make one memory version, C.
        arrived: the memory takes in tokens as they arrive, and they leave one by one.
        interleave: RoPE turns neighbours, not halves.
    """

    recent: int
    chunk: int
    arrived: bool = False
    interleave: bool = True

    @property
    def leaving(self) -> int:
        """Tokens that leave the window together."""
        return 1 if self.arrived else self.chunk

    @property
    def capacity(self) -> int:
        """Slots of the ring, W."""
        return self.recent + self.leaving - 1

    @property
    def written(self) -> int:
        """Executed tokens from which on the memory is read."""
        return self.chunk if self.arrived else self.recent + self.chunk


class Token(NamedTuple):
    """One token of every row.

    Attributes:
        q: query before RoPE, `[B, H, D]`.
        k, v: key before RoPE and value, `[B, Hkv, D]`.
        mask: bool `[B]`, the rows that execute the token.
        frequencies: of RoPE, `[D / 2]`; `None` for a model without.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    frequencies: Tensor | None


class Ring(NamedTuple):
    """What is kept exactly, updated in place.

    Attributes:
        executed: tokens before this one, int64 `[B]`.
        keys, values: `[B, Hkv, W, D]`, keys after RoPE, token i in slot `(i - 1) % W`.
        sink_keys, sink_values: `[B, Hkv, S, D]`, keys turned to their constant distance.
    """

    executed: Tensor
    keys: Tensor
    values: Tensor
    sink_keys: Tensor
    sink_values: Tensor


class Gate(NamedTuple):
    """How window and memory share a query.

    Attributes:
        kind: one of `GATES`.
        alpha: share of the window, for `fixed` alone.
        bias: `[1]` for `layer`, `[H]` for all others but `fixed`.
        weight: `[H, D]`, for `query` alone.
    """

    kind: str
    alpha: float = 0.0
    bias: Tensor | None = None
    weight: Tensor | None = None


class Virtual(NamedTuple):
    """The virtual tokens of every row, and how much they weigh.

    Attributes:
        absorbed: `[B, H, E + M]`: `W_K^T q / sqrt(D)`, then what each slot adds to its score
            whatever was read (`q . key_m / sqrt(D)` and the position's term).
        readout: latents, float32 `[B, M, E]`.
        gate: between window and virtual tokens.
    """

    absorbed: Tensor
    readout: Tensor
    gate: Gate
