"""The state of a hierarchical cache: tensors with one row per conversation, zero when empty."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .backend import REFERENCE, Backend
from .checks import check_mask
from .memory import Memory, MemoryState
from .ready import Ready
from .recent import Window
from .rows import per_row


@dataclass
class CacheState:
    """Everything that a layer remembers of B conversations.

    An empty row is all zeros, so a reset needs nothing but the mask; the memory starts from its
    learned weights when it takes in its first token.

    Attributes:
        count: executed tokens, int64 `[B]`.
        keys, values: the ring, `[B, Hkv, W, D]`, keys after RoPE; W = N + C - 1.
        sink_keys, sink_values: `[B, Hkv, S, D]`, keys turned to their constant distance.
        features: what the memory will need of the tokens that wait for it, `[B, 1, N, F]`; none
            with `write="arrived"`.
        memory: the memory's own state (fast weights, gradient so far).
        readout: what queries read of the newest memory version, `[B, *]`.
        backend: what answers streaming steps of one token, chosen when the state is made.
        ready: virtual tokens of the read-outs, where they lie ready; no part of the state.
    """

    count: Tensor
    keys: Tensor
    values: Tensor
    sink_keys: Tensor
    sink_values: Tensor
    features: Tensor
    memory: MemoryState
    readout: Tensor
    backend: Backend = REFERENCE

    def __post_init__(self) -> None:
        # No field: a state that is made of this one by `replace`, as FSDP does, begins its own.
        self.ready = Ready()

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

    def filled(self, tensors: Mapping[str, Tensor]) -> CacheState:
        """A state of this layout that holds other tensors, named as `tensors()` names them.

        Raises:
            ValueError: one is missing or of another shape.
        """
        for name, mine in self.tensors():
            if name not in tensors or tensors[name].shape != mine.shape:
                got = tuple(tensors[name].shape) if name in tensors else "none"
                raise ValueError(f"{name} must be of shape {tuple(mine.shape)}, got {got}")
        plain = {name: tensors[name] for name, _ in self.tensors() if "." not in name}
        memory = {name: tensors[f"memory.{name}"] for name in self.memory}
        return replace(self, **plain, memory=memory)

    def detach(self) -> CacheState:
        """The same values, cut from the autograd graph (between training segments)."""
        return self.map(Tensor.detach)

    def clone(self) -> CacheState:
        """A copy that shares nothing but where kernels meet (`backend`), for the same stream."""
        return self.map(Tensor.clone)

    def reset(self, mask: Tensor) -> None:
        """Erase the rows of `mask` (bool `[B]`), in place.

        Raises:
            TypeError, ValueError: the mask is no bool tensor of that shape on the state's device.
        """
        check_mask("mask", mask, self.count)
        rows = mask.nonzero()[:, 0]  # one of a thousand, where a conversation joins a server
        for _, tensor in self.tensors():
            tensor.index_fill_(0, rows, 0)

    def commit(self, new: CacheState, mask: Tensor) -> None:
        """Take the rows of `mask` (bool `[B]`) from `new`, in place; others keep their bits."""
        for (_, mine), (_, theirs) in zip(self.tensors(), new.tensors(), strict=True):
            mine.copy_(torch.where(per_row(mask, mine), theirs.to(mine.dtype), mine))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.tensors())


def empty_state(
    batch_size: int,
    window: Window,
    heads: tuple[int, int],
    memory: Memory | None,
    device: torch.device | str,
    dtype: torch.dtype,
) -> CacheState:
    """The state of `batch_size` conversations that have not begun.

    Args:
        heads: key heads and their width, Hkv and D.
        device, dtype: of the ring; the memory's own state is float32 or wider.
    """
    kv_heads, head_dim = heads
    plain = {"device": device, "dtype": dtype}
    ring = (batch_size, kv_heads, window.capacity, head_dim)
    sinks = (batch_size, kv_heads, window.sinks, head_dim)
    width, version, readout = 0, {}, torch.zeros(batch_size, 0, device=device)
    if memory is not None:
        width, version = memory.width, memory.initial(batch_size)
        readout = memory.read(version, batch_size)
    return CacheState(
        count=torch.zeros(batch_size, dtype=torch.long, device=device),
        keys=torch.zeros(ring, **plain),
        values=torch.zeros(ring, **plain),
        sink_keys=torch.zeros(sinks, **plain),
        sink_values=torch.zeros(sinks, **plain),
        features=torch.zeros(batch_size, 1, window.wait, width, **plain),
        memory={name: _zeros(tensor) for name, tensor in version.items()},
        readout=_zeros(readout),
    )


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
