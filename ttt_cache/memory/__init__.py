"""The memories: what takes in evicted tokens and answers with virtual tokens."""

from __future__ import annotations

from ..checks import whole_number
from ..config import CacheConfig
from .base import Memory, MemoryState
from .mean import Mean
from .random import Random
from .ttt_mlp import TTTMLP

__all__ = ["Memory", "MemoryState", "build_memory"]


def build_memory(
    config: CacheConfig, dim: int, kv_heads: int, head_dim: int, device=None, dtype=None
) -> Memory | None:
    """The memory that a layer's config names, or `None` for a window without memory.

    Args:
        config: settings of one layer (no per-layer mappings).
        dim: width of the hidden states.
        kv_heads, head_dim: of the attention.
        device, dtype: of the slow weights.
    """
    factory = {"device": device, "dtype": dtype}
    attention = (kv_heads, head_dim)
    slots = whole_number("virtual", config.virtual, 1)
    heads, width = config.memory_heads, config.memory_dim
    if config.memory == "ttt-mlp":
        return TTTMLP(
            dim, heads, width, config.hidden_dim, slots, config.chunk, attention, **factory
        )
    if config.memory == "random":
        return Random(slots, heads * width, attention, **factory)
    if config.memory == "mean":
        return Mean(*attention, **factory)
    return None
