"""M running clusters of keys: a memory that needs no training. One of them is mean pooling."""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import wide
from ..rows import choose
from .base import Frames, Memory, MemoryState, by_token

SAME = 1e-4  # squared distances, in squared lengths of the key, that do not count


class Cluster(Memory):
    """Sequential k-means of the keys before RoPE, each key head for itself (MacQueen 1967).

    A token joins the cluster with the nearest mean key, but while there are clusters without
    tokens it starts one of these, unless it repeats a key. Differences below 1% of the key's length
    count as none, so that rounding does not choose.

    Args:
        slots: clusters, M.
        kv_heads, head_dim: of the attention: Hkv, D.
        device, dtype: of the model; means are kept in float32 or wider.
    """

    zero: Tensor

    def __init__(self, slots: int, kv_heads: int, head_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.slots, self.kv_heads, self.head_dim = slots, kv_heads, head_dim
        self.width = 2 * kv_heads * head_dim
        self.register_buffer("zero", torch.zeros((), device=device, dtype=dtype), persistent=False)

    def features(self, frames: Frames) -> Tensor:
        return by_token(torch.cat([frames.k, frames.v], dim=-1))  # [B, T, Hkv * 2 D]

    def initial(self, batch_size: int) -> MemoryState:
        shape, dtype = (batch_size, self.kv_heads, self.slots), wide(self.zero.dtype)
        return {
            "means": self.zero.new_zeros(*shape, 2 * self.head_dim, dtype=dtype),
            "members": self.zero.new_zeros(*shape, 1, dtype=dtype),
        }

    def take(self, state: MemoryState, token: Tensor) -> None:
        for name, new in self._with(state, token).items():
            state[name].copy_(new)

    def scan(
        self, state: MemoryState, tokens: Tensor, valid: Tensor, closes: Tensor
    ) -> tuple[MemoryState, MemoryState]:
        states = []  # a chunk's end changes nothing
        for chunk, are_tokens in zip(tokens.unbind(1), valid.unbind(1), strict=True):
            for token, is_token in zip(chunk.unbind(1), are_tokens.unbind(1), strict=True):
                state = choose(is_token, self._with(state, token), state)
            states.append(state)
        return {name: torch.stack([s[name] for s in states]) for name in state}, state

    def read(self, state: MemoryState, batch_size: int) -> Tensor:
        return torch.cat([state["means"], state["members"]], dim=-1)

    def _with(self, state: MemoryState, token: Tensor) -> MemoryState:
        """The state after one more token, features `[B, F]`."""
        means, members = state["means"], state["members"]
        pair = token.to(means.dtype).unflatten(1, (self.kv_heads, 1, -1))  # [B, Hkv, 1, 2 D]
        joins = self._joins(pair, means, members)  # [B, Hkv, M, 1]
        moved = means + (pair - means) / (members + 1)
        return {"means": torch.where(joins, moved, means), "members": members + joins}

    def _joins(self, pair: Tensor, means: Tensor, members: Tensor) -> Tensor:
        """Which cluster takes the token, `[B, Hkv, M, 1]`: the first that is as near as any.

        Clusters fill up in order, so an empty one comes after those that a key may repeat.
        """
        keys, key = means[..., : self.head_dim], pair[..., : self.head_dim]
        distance = (key - keys).square().sum(-1, keepdim=True)
        distance = torch.where(members > 0, distance, 0)
        slack = SAME * key.square().sum(-1, keepdim=True)
        near = distance <= distance.amin(-2, keepdim=True) + slack
        return near & (near.cumsum(-2) == 1)


class Mean(Cluster):
    """A control: mean pooling, as in the compressed memory of arXiv 1911.05507 with one slot.

    One cluster, which stands for one token however many it has seen.
    """

    def __init__(self, kv_heads: int, head_dim: int, device=None, dtype=None) -> None:
        super().__init__(1, kv_heads, head_dim, device, dtype)

    def read(self, state: MemoryState, batch_size: int) -> Tensor:
        return torch.cat([state["means"], torch.ones_like(state["members"])], dim=-1)
