"""A training step of one whole layer of Moshi 7B: forward and backward, stock and patched.

Norms, projections and feed-forward are in it; gradients go to the input, to every weight of the
layer and to the adapter. Before that the kernels of training, outputs and gradients, beside plain
PyTorch in float64.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from common import transformer
from core import worst
from gpu_kernels import share
from moshi.modules.rope import RotaryEmbedding
from moshi.modules.transformer import StreamingTransformer
from torch import Tensor

import ttt_cache
from ttt_cache import CacheConfig, HierarchicalCache
from ttt_cache.bench.check import ALLOWED, off
from ttt_cache.bench.core import MOSHI, Widths, chosen, stir
from ttt_cache.bench.timing import Frames, interleave
from ttt_cache.targets import attention_of

HIDDEN = 4.125  # of the feed-forward, in widths


class Layer:
    """One layer, and the most that a step of it has held beside what was there before."""

    def __init__(self, model: StreamingTransformer) -> None:
        self.model, self.peak = model, 0
        self.device = next(model.parameters()).device

    def chunk(self, frames: Frames) -> float:
        """Milliseconds of forward and backward on `x` and the gradient by its output."""
        x, by_output = frames
        leaves, before = [x, *self.model.parameters()], 0
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        began = time.perf_counter_ns()
        found = torch.autograd.grad(self.model(x), leaves, by_output, allow_unused=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - before)
        spent = (time.perf_counter_ns() - began) / 1e6
        missing = [
            str(tuple(leaf.shape)) for leaf, g in zip(leaves, found, strict=True) if g is None
        ]
        if missing:
            raise SystemExit(f"no gradient reaches weights of {', '.join(missing)}")
        return spent


def kernel_error(
    device: torch.device,
    dtype: torch.dtype,
    settings: dict[str, Any],
    frames: int,
    backend: str = "triton",
) -> float:
    """The largest error of a call's outputs and gradients in kernels, as a share of its budget."""
    sizes: dict[str, Any] = {"dim": 512, "num_heads": 4, "head_dim": 128}
    rope = RotaryEmbedding(interleave=True)
    cache = HierarchicalCache(CacheConfig(**settings), rope=rope, device=device, **sizes)
    stir(cache)
    heads = torch.randn(3, 2, sizes["num_heads"], frames, sizes["head_dim"], device=device)
    tokens = [*heads.unbind(), torch.randn(2, frames, sizes["dim"], device=device)]
    by_output = torch.randn_like(tokens[0])

    def outcome(dtype: torch.dtype, backend: str) -> list[Tensor]:
        one = copy.deepcopy(cache).to(dtype)
        leaves = [z.to(dtype).requires_grad_() for z in tokens]
        with chosen(backend):
            y, _ = one(*leaves)
            wanted = [*leaves, *one.parameters()]
            return [y.detach(), *torch.autograd.grad(y, wanted, by_output.to(dtype))]

    arms = ((dtype, backend), (torch.float64, "reference"), (dtype, "reference"))
    each = zip(*(outcome(*arm) for arm in arms), strict=True)
    return worst(share(found, exact, plain) for found, exact, plain in each)


def layers(
    device: torch.device, dtype: torch.dtype, settings: dict[str, Any], widths: Widths = MOSHI
) -> dict[str, Layer]:
    """A stock layer and a patched one of the same weights."""
    sizes = (widths.dim, widths.heads, 1, int(HIDDEN * widths.dim))
    stock, patched = (transformer(*sizes, device=device, dtype=dtype) for _ in range(2))
    patched.load_state_dict(stock.state_dict())
    ttt_cache.patch(patched, **settings)
    return {"stock": Layer(stock), "patched": Layer(patched)}


def measure(
    pair: dict[str, Layer],
    length: int,
    recent: int,
    dtype: torch.dtype,
    repetitions: int,
    backend: str = "triton",
) -> dict[str, Any]:
    """Medians and peaks of both layers on one recording of so many frames.

    Raises:
        SystemExit: they differ while nothing has left the window, or a gradient is missing.
    """
    device = pair["stock"].device
    dim = attention_of(pair["stock"].model, 0).embed_dim

    def draw() -> Frames:
        x, by_output = torch.randn(2, 1, length, dim, device=device, dtype=dtype).unbind()
        return x.requires_grad_(), by_output

    x: Tensor = draw()[0].detach()
    with chosen(backend):
        with torch.no_grad():
            apart = off(*(pair[name].model(x)[:, :recent] for name in ("patched", "stock")))
        if not apart <= ALLOWED[dtype]:
            raise SystemExit(
                f"the patched layer is not stock's before its first eviction: {apart:.3g}"
            )
        samples = interleave(pair, draw, repetitions)
    return {
        "off": apart,
        "ms": {name: statistics.median(ms) for name, ms in samples.items()},
        "peak_bytes": {name: layer.peak for name, layer in pair.items()},
        "samples_ms": samples,
    }
