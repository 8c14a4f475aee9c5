"""The patched step with somebody else's attention in it.

Ring, positions, memory and virtual tokens are those of the cache, so a peer computes what a cache
with `gate="head"` does: two attentions, each with a softmax of its own, and a gate between them.
Virtual keys and values are built at model width, as these attentions need them.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ttt_cache.backend import Backend
from ttt_cache.cache import HierarchicalCache
from ttt_cache.memory import TTT, Frames
from ttt_cache.memory.tokens import LatentTokens
from ttt_cache.recent import ages
from ttt_cache.state import CacheState
from ttt_cache.step import keep, remember

from .core import Core
from .device import triton_missing

# q [B, H, 1, D], keys and values [B, H, L, D], which of them are seen, bool [B, L] -> [B, H, 1, D]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Peer:
    """Answers the steps of a state in place of the cache's own kernels.

    Args:
        kernels: make the memory's step in Triton, so that arms differ in their attention alone.
    """

    def __init__(self, attend: Attend, kernels: bool) -> None:
        self.attend, self.kernels = attend, kernels

    def step(
        self,
        cache: HierarchicalCache,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        state: CacheState,
        mask: Tensor,
    ) -> Tensor:
        """As `ttt_cache.step.step`, for as many key heads as query heads and no sinks."""
        token, window = state.count + 1, cache.window
        turned = keep(cache, q, k, v, state, token, mask)
        seen = ages(token, window.capacity) < (token - window.evicted(token))[:, None]
        if isinstance(cache.memory, TTT):
            features = cache.memory.features(Frames(x, q, k, v, None))
            if self.kernels:
                from ttt_cache.fused import memory_of
                from ttt_cache.kernels.memory_step import memory_step

                given = memory_of(cache, cache.memory, state)
                memory_step(features[:, 0], state.count, mask, *given)
            else:
                remember(cache, features, state, token, mask)
        state.count.add_(mask)
        recent = self.attend(turned, state.keys, state.values, seen)
        if not isinstance(cache.reader, LatentTokens):
            return recent
        keys, values = _virtual(cache.reader, state.readout[:, None].to(q.dtype))
        remembered = self.attend(q, keys, values, None)
        return cache.mix(remembered, recent, q, state.count[:, None])


def _virtual(reader: LatentTokens, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, H, M, D]` of read-outs `[B, 1, M, E]`."""
    keys = latents @ reader.to_key.transpose(-1, -2) + reader.slot_key.transpose(-1, -2)
    return keys, latents @ reader.to_value


def install(core: Core, name: str, make: Callable[[Core], Attend]) -> None:
    """Let a core's steps be answered by a peer."""
    assert core.state is not None
    peer = Peer(make(core), kernels=triton_missing(core.place.device) is None)
    core.state.backend = Backend(name, "a peer of the benchmark", cast(Any, peer))


def two_sdpa(_: Core) -> Attend:
    """PyTorch's own attention."""

    def attend(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
        mask = None if seen is None else seen[:, None, None]
        return scaled_dot_product_attention(q, keys, values, mask)

    return attend


def flex(_: Core) -> Attend:
    """FlexAttention (arXiv 2412.05496), compiled; what is not seen is a change of scores."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
        def hide(score: Tensor, row: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:
            assert seen is not None
            return torch.where(seen[row, slot], score, float("-inf"))

        return cast(Tensor, compiled(q, keys, values, None if seen is None else hide))

    return attend


def flashinfer_window(core: Core) -> Attend:
    """FlashInfer (arXiv 2501.01005) over a full window: each row's ring is one page.

    Lengths are planned on the host, so a captured step sees all slots, whether written or not.
    """
    import flashinfer  # pyright: ignore[reportMissingImports]

    assert core.state is not None
    batch, heads, slots, width = core.state.keys.shape
    whole = {"dtype": torch.int32, "device": core.place.device}
    rows = torch.arange(batch + 1, **whole)
    lengths = torch.full((batch,), slots, **whole)
    room = torch.empty(128 << 20, dtype=torch.uint8, device=core.place.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        room,
        "HND",
        use_cuda_graph=True,
        paged_kv_indptr_buffer=rows.clone(),
        paged_kv_indices_buffer=rows[:-1].clone(),
        paged_kv_last_page_len_buffer=lengths.clone(),
    )
    kind = core.place.dtype
    wrapper.plan(
        rows, rows[:-1], lengths, core.place.widths.heads, heads, width, slots,
        q_data_type=kind, data_type=kind,
    )  # fmt: skip

    def attend(q: Tensor, keys: Tensor, values: Tensor, _: Tensor | None) -> Tensor:
        return wrapper.run(q[:, :, 0].contiguous(), (keys, values)).unsqueeze(2)

    return attend


def flashinfer_missing() -> str | None:
    """Why FlashInfer is not measured, if it is not."""
    return None if find_spec("flashinfer") else "the package flashinfer is not installed"
