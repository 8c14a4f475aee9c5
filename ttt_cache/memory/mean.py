"""One virtual token: the mean of the evicted keys (before RoPE) and values. No training needed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import Memory, MemoryState, wide


class Mean(Memory):
    """A control: mean pooling, as in the compressed memory of arXiv 1911.05507 with one slot.

    Args:
        kv_heads: key heads of the attention.
        head_dim: width of an attention head.
        device, dtype: of the model; the mean is kept in float32 or wider.
    """

    slots = 1
    zero: Tensor

    def __init__(self, kv_heads: int, head_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.width = 2 * kv_heads * head_dim
        self.kv_heads = kv_heads
        self.scale = 1 / math.sqrt(head_dim)
        self.register_buffer("zero", torch.zeros((), device=device, dtype=dtype), persistent=False)

    def features(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cat([k, v], dim=1).transpose(1, 2).flatten(2)

    def initial(self, batch_size: int) -> MemoryState:
        zero = self.zero
        return {
            "mean": zero.new_zeros(batch_size, self.width, dtype=wide(zero.dtype)),
            "seen": zero.new_zeros(batch_size, 1, dtype=torch.long),
        }

    def feed(self, state: MemoryState, token: Tensor) -> MemoryState:
        seen = state["seen"] + 1
        return {"mean": state["mean"] + (token - state["mean"]) / seen, "seen": seen}

    def feed_chunk(self, state: MemoryState, tokens: Tensor, valid: Tensor) -> MemoryState:
        seen = state["seen"] + valid.sum(1, keepdim=True)
        apart = (tokens - state["mean"][:, None]).masked_fill(~valid[..., None], 0)
        return {"mean": state["mean"] + apart.sum(1) / seen.clamp(min=1), "seen": seen}

    def finish(self, state: MemoryState) -> MemoryState:
        return state

    def read(self, state: MemoryState, batch_size: int) -> Tensor:
        return state["mean"]

    def score(self, q: Tensor, readout: Tensor) -> Tensor:
        keys, _ = self._split(readout.to(q.dtype))
        return (q * self.scale) @ keys.transpose(-1, -2)

    def mix(self, weights: Tensor, readout: Tensor) -> Tensor:
        _, values = self._split(readout.to(weights.dtype))
        return weights @ values

    def _split(self, readout: Tensor) -> tuple[Tensor, ...]:
        """`[B, G, V, F]` -> keys and values `[B, Hkv, 1, G, V, D]`."""
        both = readout.unflatten(-1, (2, self.kv_heads, -1)).permute(3, 0, 4, 1, 2, 5)
        return both[0].unsqueeze(2), both[1].unsqueeze(2)
