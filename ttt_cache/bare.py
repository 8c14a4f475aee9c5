"""The step of a bare window, to the bit what Moshi's own attention computes.

Without a memory and without sinks a window as long as the context is stock Moshi, and whoever
compares with it wants the same samples. In 16 bits every rounding may change one, so the arithmetic
is Moshi's there: its rotary positions and `scaled_dot_product_attention` over the ring. In float32
the last bits, which differ, change none, and `ttt_cache.step` is faster on a CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moshi.modules.transformer import expand_repeated_kv
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from . import recent
from .recent import Slot
from .rows import unless_all
from .state import CacheState

if TYPE_CHECKING:
    from .cache import HierarchicalCache


def is_bare(cache: HierarchicalCache, state: CacheState) -> bool:
    """Whether a cache is a window and nothing else, in 16 bits."""
    return cache.reader is None and not cache.window.sinks and state.keys.element_size() == 2


def step(
    cache: HierarchicalCache, q: Tensor, k: Tensor, v: Tensor, state: CacheState, mask: Tensor
) -> Tensor:
    """Answer one query per row and advance the rows of `mask`, as `ttt_cache.step.step` does."""
    capacity, token = cache.window.capacity, state.count + 1
    if cache.rope is not None:
        q, k = cache.rope(q, k, state.count)
    slot, only = Slot.of(token, capacity), unless_all(mask)
    slot.write(state.keys, k[:, :, 0], only)
    slot.write(state.values, v[:, :, 0], only)
    state.count.add_(mask)
    seen = recent.ages(token, capacity) < token[:, None]
    keys, values = state.keys.to(q.dtype), state.values.to(q.dtype)
    repeat = cache.num_heads // cache.kv_heads
    if repeat > 1:
        keys, values = expand_repeated_kv(keys, repeat), expand_repeated_kv(values, repeat)
    return scaled_dot_product_attention(q, keys, values, seen[:, None, None])
