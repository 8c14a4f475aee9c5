"""What the training attention and its reference are given, beside settings of a layer and a gate.

Symbols are those of `docs/semantics.md`: B rows, H query heads on Hkv key heads of width D, S
sinks, M virtual tokens read as latents of width E; T new tokens, L columns of old and new ones.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .inputs import Gate


class Seen(NamedTuple):
    """T new tokens of every row, and what they may look at exactly.

    Axes may have any strides but the last, which has no gaps.

    Attributes:
        q: queries before RoPE, `[B, H, T, D]`: sinks, virtual tokens and the gate `query` use them.
        turned_q: queries after RoPE, `[B, H, T, D]`.
        keys, values: `[B, Hkv, L, D]`, keys after RoPE. Column j is token number
            `start + j + 1 - (L - T)`; what stands in columns of numbers below 1 is never used.
        sink_keys, sink_values: `[B, Hkv, S, D]`, keys turned to their constant distance.
        start: tokens before these, int64 `[B]`; rows may be in different phases.
    """

    q: Tensor
    turned_q: Tensor
    keys: Tensor
    values: Tensor
    sink_keys: Tensor
    sink_values: Tensor
    start: Tensor


class Latents(NamedTuple):
    """The versions of the memory that the new tokens read, and how.

    Attributes:
        readouts: float32 `[B, V, M, E]`, of the version at the start of the call and of later ones.
        to_key: W_K `[Hkv, D, E]`.
        slot_key: what is added to the keys of a slot, `[Hkv, D, M]`.
        to_value: W_V `[Hkv, E, D]`.
        slot_bias: what is added to the scores of a slot, `[H, M]`, if anything.
        gate: between window and virtual tokens.
    """

    readouts: Tensor
    to_key: Tensor
    slot_key: Tensor
    to_value: Tensor
    slot_bias: Tensor | None
    gate: Gate
