"""The memories: what takes in tokens, and how queries read it."""

from __future__ import annotations

from typing import NamedTuple

from ..checks import whole_number
from ..config import CacheConfig
from .base import Frames, Memory, MemoryState
from .cluster import Cluster, Mean
from .query import QueryReader
from .random import Random
from .tokens import LatentTokens, PlainTokens, VirtualTokens
from .ttt import TTT

__all__ = [
    "TTT",
    "Attention",
    "Frames",
    "Memory",
    "MemoryState",
    "QueryReader",
    "VirtualTokens",
    "build_memory",
    "build_reader",
]


class Attention(NamedTuple):
    """Sizes of the attention that a memory belongs to: dim, H, Hkv and D."""

    dim: int
    num_heads: int
    kv_heads: int
    head_dim: int

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """For each source, the widths of what is learned of a token and of what it asks with."""
        heads, pairs = self.num_heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        return {"hidden": (self.dim, self.dim), "kv": (pairs, heads), "output": (heads, heads)}


def build_memory(config: CacheConfig, sizes: Attention, device=None, dtype=None) -> Memory | None:
    """The memory that a layer's config names, or `None` for a window without memory.

    Args:
        config: settings of one layer (no per-layer mappings).
        device, dtype: of the slow weights.
    """
    factory = {"device": device, "dtype": dtype}
    slots = whole_number("virtual", config.virtual, 1)
    heads, width = config.memory_heads, config.memory_dim
    if config.memory in ("ttt-mlp", "ttt-linear"):
        layers = config.depth if config.memory == "ttt-mlp" else 1
        virtual = config.read == "virtual"
        return TTT(
            sizes.widths[config.source][0],
            config.source,
            heads,
            width,
            hidden=[config.hidden_dim] * (layers - 1),
            chunk=config.chunk,
            slots=slots if virtual else None,
            publishes=config.write == "evicted",
            **factory,
        )
    if config.memory == "random":
        return Random(slots, heads * width, **factory)
    if config.memory == "cluster":
        return Cluster(slots, sizes.kv_heads, sizes.head_dim, **factory)
    if config.memory == "mean":
        return Mean(sizes.kv_heads, sizes.head_dim, **factory)
    return None


def build_reader(
    config: CacheConfig, sizes: Attention, device=None, dtype=None
) -> VirtualTokens | QueryReader | None:
    """How queries read the memory that `build_memory` makes of the same arguments."""
    factory = {"device": device, "dtype": dtype}
    slots = whole_number("virtual", config.virtual, 1)
    latent_dim = config.memory_heads * config.memory_dim
    if config.memory == "none":
        return None
    if config.memory in ("cluster", "mean"):
        return PlainTokens(1 if config.memory == "mean" else slots, sizes.head_dim)
    if config.read == "query":
        width = sizes.widths[config.source][1]
        return QueryReader(
            width, config.source, latent_dim, sizes.num_heads, sizes.head_dim, **factory
        )
    _, num_heads, kv_heads, head_dim = sizes
    return LatentTokens(
        slots, latent_dim, num_heads, kv_heads, head_dim, config.position, **factory
    )
