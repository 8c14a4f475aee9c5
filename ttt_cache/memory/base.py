"""What every memory can do: one protocol, two forms, functional in the state."""

from __future__ import annotations

import abc
from typing import NamedTuple

import torch
from torch import Tensor, nn

MemoryState = dict[str, Tensor]
"""The state of a memory: tensors with one row per conversation on the first axis."""


class Frames(NamedTuple):
    """What is known of T tokens when they arrive.

    Attributes:
        x: hidden states, `[B, T, dim]`.
        q: queries before RoPE, `[B, H, T, D]`.
        k, v: keys before RoPE and values, `[B, Hkv, T, D]`.
        output: attention output over window and sinks, `[B, H, T, D]`; `None` unless the memory
            learns it.
    """

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    output: Tensor | None

    def learned(self, source: str) -> Tensor:
        """What a network learns of each token, `[B, T, |s|]`."""
        if source == "kv":
            return torch.cat([by_token(self.k), by_token(self.v)], dim=-1)
        return self._origin(source)

    def asked(self, source: str) -> Tensor:
        """What each token asks a network with, `[B, T, |a|]`."""
        return by_token(self.q) if source == "kv" else self._origin(source)

    def _origin(self, source: str) -> Tensor:
        if source == "hidden":
            return self.x
        assert self.output is not None
        return by_token(self.output)


class Memory(nn.Module, abc.ABC):
    """A compressor of tokens.

    The update has two forms that are the same function. Streaming works in place: `begin` before
    a row's first token, `take` for every token, `close` at the end of a chunk. `scan` takes in many
    chunks, is differentiable and changes nothing that it is given. Inner arithmetic is float32 or
    wider whatever the dtype of the model.

    Attributes:
        width: features per token, F: what a waiting token costs in the ring.
    """

    width: int

    @abc.abstractmethod
    def features(self, frames: Frames) -> Tensor:
        """What the memory keeps of each token until it takes it in, `[B, T, F]`."""

    @abc.abstractmethod
    def initial(self, batch_size: int) -> MemoryState:
        """Memory version 0 for `batch_size` rows. Views of the weights: do not write into them."""

    def begin(self, state: MemoryState) -> None:
        """Put version 0 in place of an empty row's zeros."""
        for name, first in self.initial(1).items():
            state[name].copy_(first)

    @abc.abstractmethod
    def take(self, state: MemoryState, token: Tensor) -> None:
        """Take in one token, features `[B, F]`, in place."""

    def close(self, state: MemoryState) -> None:
        """Close a chunk, in place: what follows is the next memory version."""

    @abc.abstractmethod
    def read(self, state: MemoryState, batch_size: int) -> Tensor:
        """The read-out `[B, *]`: what readers need of a memory version."""

    @abc.abstractmethod
    def scan(
        self, state: MemoryState, tokens: Tensor, valid: Tensor, closes: Tensor
    ) -> tuple[MemoryState, MemoryState]:
        """Take in K chunks of tokens, in order.

        Args:
            tokens: features `[B, K, C, F]`; those outside `valid` `[B, K, C]` are none.
            closes: which rows end which chunk, `[B, K]`. A row has no tokens after a chunk that it
                does not end.

        Returns:
            what `read` needs of the state after each chunk, `[K, B, *]`, and the state at the end.
        """


def by_token(heads: Tensor) -> Tensor:
    """All heads of a token side by side: `[B, H, T, D]` -> `[B, T, H * D]`."""
    return heads.transpose(1, 2).flatten(2)


def by_column(matrix: Tensor) -> Tensor:
    """Weights `[*, in, out]`, their columns one after the other in memory.

    The product of few tokens with them reads them in that order: on a CPU, where that is all it
    takes, in half to three quarters of the time. And a token's product has the same bits wherever
    it stands among the others; read in rows, it has not where columns are no multiple of 4.
    """
    return matrix.mT.contiguous().mT
