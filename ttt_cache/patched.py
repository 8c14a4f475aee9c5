"""Moshi's self-attention with a hierarchical cache in place of its ring.

A patched attention keeps its module, its projections, its hooks and its place in the model: only
the class of the instance changes, and a `HierarchicalCache` is added under `ttt_cache`. So module
paths, `_cached_children` and the state dict of everything else stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from moshi.modules.streaming import State
from moshi.modules.transformer import StreamingMultiheadAttention
from torch import Tensor

from .cache import HierarchicalCache
from .state import CacheState
from .targets import projection_format

SLOT = "ttt_cache"  # name of the cache inside an attention, of the handle on a transformer


@dataclass
class PatchedState(State):
    """Streaming state of a patched attention, as Moshi's streaming machinery handles it."""

    cache: CacheState

    def reset(self, reset_mask: Tensor) -> None:
        super().reset(reset_mask)
        self.cache.reset(reset_mask)


class PatchedAttention(StreamingMultiheadAttention):
    """Moshi's self-attention with a hierarchical cache in place of its ring."""

    ttt_cache: HierarchicalCache

    def _init_streaming_state(self, batch_size: int) -> PatchedState:  # type: ignore[override]
        device, dtype = projection_format(self)
        cache = self.ttt_cache.init_state(batch_size, device, dtype)
        return PatchedState(batch_size, device, cache)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = self._project(query)
        state = self._streaming_state
        if state is None:
            y, _ = self.ttt_cache(q, k, v, query)
        else:
            if not isinstance(state, PatchedState):
                raise RuntimeError(
                    f"the streaming state of a patched attention must be a PatchedState, got a "
                    f"{type(state).__name__}: it was taken before the model was patched"
                )
            y = self.ttt_cache.stream(q, k, v, query, state.cache, state.exec_mask)
        return self.out_projs[0](y.transpose(1, 2).flatten(2))

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width = self.embed_dim // self.num_heads
        heads = self.in_projs[0](x).unflatten(-1, (-1, width)).transpose(1, 2)
        kv_heads = self.num_heads // self.kv_repeat
        sizes = (self.num_heads, kv_heads, kv_heads)
        if not heads.requires_grad:
            return heads.split(sizes, dim=1)
        unpacked = _Unpacked.apply(heads, sizes)
        assert unpacked is not None
        return unpacked


class _Unpacked(torch.autograd.Function):
    """Queries, keys and values as views of all heads, `[B, H + 2 Hkv, T, D]`.

    Gradients that lie side by side already, as `ttt_cache.blocks` leaves them, are not copied.
    """

    @staticmethod
    def forward(
        ctx: Any, heads: Tensor, sizes: tuple[int, int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = heads.split(sizes, dim=1)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        whole = _whole(gradients)
        return torch.cat(gradients, dim=1) if whole is None else whole, None


def _whole(parts: tuple[Tensor, ...]) -> Tensor | None:
    """What parts are all slices of, along the second axis and in order; `None` if of nothing."""
    first, end = parts[0], parts[0].storage_offset()
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        place = part.untyped_storage().data_ptr(), part.storage_offset(), part.stride()
        if place != (storage, end, first.stride()):
            return None
        end += part.shape[1] * part.stride(1)
    heads = sum(part.shape[1] for part in parts)
    return first.as_strided((first.shape[0], heads, *first.shape[2:]), first.stride())
