"""The state of a hierarchical cache: tensors with one row per conversation, zero when empty."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .checks import check_mask
from .memory import MemoryState


@dataclass
class CacheState:
    """Everything that a layer remembers of B conversations.

    An empty row is all zeros, so a reset needs nothing but the mask; the memory starts from its
    learned weights when it takes in its first token.

    Attributes:
        count: executed tokens, int64 `[B]`.
        keys, values: the ring, `[B, Hkv, W, D]`, keys after RoPE; W = N + C - 1.
        sink_keys, sink_values: `[B, Hkv, S, D]`, keys turned to their constant distance.
        features: what the memory will need of the tokens in the window, `[B, 1, N, F]`.
        memory: the memory's own state (fast weights, gradient so far).
        readout: the read-outs of the newest memory version, `[B, *]`.
    """

    count: Tensor
    keys: Tensor
    values: Tensor
    sink_keys: Tensor
    sink_values: Tensor
    features: Tensor
    memory: MemoryState
    readout: Tensor

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name, memory tensors as `memory.<name>`."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                yield name, value
        for name, value in self.memory.items():
            yield f"memory.{name}", value

    def map(self, fn: Callable[[Tensor], Tensor]) -> CacheState:
        """A new state with `fn` applied to every tensor."""
        plain = {name: fn(t) for name, t in self.tensors() if "." not in name}
        return replace(self, **plain, memory={name: fn(t) for name, t in self.memory.items()})

    def detach(self) -> CacheState:
        """The same values, cut from the autograd graph (between training segments)."""
        return self.map(Tensor.detach)

    def clone(self) -> CacheState:
        """A copy that shares nothing."""
        return self.map(Tensor.clone)

    def reset(self, mask: Tensor) -> None:
        """Erase the rows of `mask` (bool `[B]`), in place.

        Raises:
            TypeError, ValueError: the mask is not a bool tensor of that shape.
        """
        check_mask("mask", mask, self.count.shape[0])
        for _, tensor in self.tensors():
            tensor.masked_fill_(per_row(mask, tensor), 0)

    def commit(self, new: CacheState, mask: Tensor) -> None:
        """Take the rows of `mask` (bool `[B]`) from `new`, in place; others keep their bits."""
        for (_, mine), (_, theirs) in zip(self.tensors(), new.tensors(), strict=True):
            mine.copy_(torch.where(per_row(mask, mine), theirs.to(mine.dtype), mine))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.tensors())


def per_row(mask: Tensor, like: Tensor) -> Tensor:
    """A `[B]` mask shaped to broadcast over `like` `[B, ...]`."""
    return mask.view(-1, *([1] * (like.dim() - 1)))


def choose(mask: Tensor, new: MemoryState, old: MemoryState) -> MemoryState:
    """Row by row, the memory state `new` where `mask` (bool `[B]`), else `old`."""
    return {name: torch.where(per_row(mask, t), t, old[name]) for name, t in new.items()}
