"""What every memory can do: one protocol, two forms, functional in the state."""

from __future__ import annotations

import abc

import torch
from torch import Tensor, nn

MemoryState = dict[str, Tensor]
"""The state of a memory: tensors with one row per conversation on the first axis."""


class Memory(nn.Module, abc.ABC):
    """A compressor of evicted tokens into `slots` virtual tokens.

    The update has two forms that are the same function: `feed` takes one token, `feed_chunk` takes
    several tokens of one chunk at once; `finish` closes a chunk. No method changes its arguments.
    Inner arithmetic is float32 or wider whatever the dtype of the model.

    Attributes:
        slots: number of virtual tokens, M.
        width: features per token, F: what a waiting token costs in the ring.
    """

    slots: int
    width: int

    @abc.abstractmethod
    def features(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the memory keeps of each token until it is evicted.

        Args:
            x: hidden states, `[B, T, dim]`.
            k: keys before RoPE, `[B, Hkv, T, D]`.
            v: values, `[B, Hkv, T, D]`.

        Returns:
            `[B, T, F]`.
        """

    @abc.abstractmethod
    def initial(self, batch_size: int) -> MemoryState:
        """Memory version 0 for `batch_size` rows. Views of the weights: do not write into them."""

    @abc.abstractmethod
    def feed(self, state: MemoryState, token: Tensor) -> MemoryState:
        """Take in one evicted token, features `[B, F]`."""

    @abc.abstractmethod
    def feed_chunk(self, state: MemoryState, tokens: Tensor, valid: Tensor) -> MemoryState:
        """Take in the tokens `[B, L, F]` of one chunk, in order, where `valid` `[B, L]`."""

    @abc.abstractmethod
    def finish(self, state: MemoryState) -> MemoryState:
        """Close a chunk: what follows is the next memory version."""

    @abc.abstractmethod
    def read(self, state: MemoryState, batch_size: int) -> Tensor:
        """The read-out `[B, *]` of a memory version, from which scores and values come."""

    @abc.abstractmethod
    def score(self, q: Tensor, readout: Tensor) -> Tensor:
        """Scores of queries against virtual tokens, scaled by `1 / sqrt(D)`.

        Args:
            q: queries before RoPE, `[B, Hkv, R, G, L, D]`: R query heads per key head, and G groups
                of L queries; a group shares its read-outs.
            readout: `[B, G, V, *]`: the V memory versions that a group may see.

        Returns:
            `[B, Hkv, R, G, L, V * M]`.
        """

    @abc.abstractmethod
    def mix(self, weights: Tensor, readout: Tensor) -> Tensor:
        """Weighted sum of virtual values: `[B, Hkv, R, G, L, V * M]` -> `[B, Hkv, R, G, L, D]`."""


def matmul_heads(x: Tensor, weight: Tensor) -> Tensor:
    """`[B, Hkv, *, D] @ [Hkv, D, E]` -> `[B, Hkv, *, E]`, one matrix per key head.

    Rows are folded into one product per head: broadcasting would copy the matrices for each row.
    """
    by_head = x.transpose(0, 1)
    product = by_head.flatten(1, -2) @ weight
    return product.unflatten(1, by_head.shape[1:-1]).transpose(0, 1)


def wide(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of inner arithmetic beside a model of `dtype`: float32, or float64 for that."""
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
