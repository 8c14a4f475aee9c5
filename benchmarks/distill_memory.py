"""What layer-wise distillation of Moshi 7B holds in memory at 12,000 frames: does it fit 80 GB?

Nothing of that size is run. The lesson of `ttt_cache.distill` runs on meta tensors, which have
every shape and no content, while each storage is counted when it is made and when it is dropped:
the peak is that of the real shapes, forward and backward. The count is checked where it can be: at
small widths the same lesson runs on the CPU, under torch's own memory profiler, and both peaks must
agree. Stock Moshi's attention is counted as its fused kernel has it on a GPU: the output, the
softmax statistics and the mask as a bias, never T x T scores for each head.
"""

from __future__ import annotations

import argparse
import weakref
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch as replaced

import torch
import torch.nn.functional as F
from common import environment, publish, quiet_process
from moshi.models.lm import LMModel
from moshi.models.loaders import _lm_kwargs, get_moshi_lm
from peak import peak_bytes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ttt_cache
from ttt_cache.evaluation.lines import Line
from ttt_cache.training.lesson import lesson
from ttt_cache.training.loss import predict
from ttt_cache.training.masters import float32_adapter

FRAMES = 12_000
LIMIT = 80.0  # GB, 10^9 bytes
SMALL = {"dim": 128, "num_heads": 4, "hidden_scale": 2, "card": 64, "text_card": 64, "dep_q": 0}


class Held(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, and the most at a time."""

    def __init__(self, before: list[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self.known:
            return
        self.known.add(address)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, address, storage.nbytes())

    def _drop(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, **_: Any) -> Tensor:
    """What a fused kernel allocates: the mask as a bias, the statistics, the output."""
    bias, statistics = mask.to(q.dtype), q.new_empty(q.shape[:-1], dtype=torch.float32)
    del bias, statistics
    return torch.empty_like(q)


@contextmanager
def fused(on: bool):
    if not on:
        yield
        return
    with replaced.object(F, "scaled_dot_product_attention", fused_attention):
        yield


def counted(lm: LMModel, frames: int, fused_kernel: bool) -> int:
    """The peak of one lesson of a model on the meta device, without its weights."""
    codes = torch.zeros(1, lm.num_codebooks, frames + 1, dtype=torch.long, device="meta")
    handle = ttt_cache.patch(lm)
    with float32_adapter(handle), fused(fused_kernel):
        held = Held([*lm.parameters(), *lm.buffers(), codes])
        with held:
            lesson(handle, lambda: predict(lm, codes))
    handle.remove()
    return held.most


def profiled(lm: LMModel, frames: int) -> int:
    """The same on the CPU, by torch's profiler."""
    codes = torch.randint(0, 60, (1, lm.num_codebooks, frames + 1))
    with ttt_cache.patch(lm) as handle:
        return peak_bytes(lambda: lesson(handle, lambda: predict(lm, codes)))


def small(layers: int, device: str) -> LMModel:
    settings: dict[str, Any] = dict(_lm_kwargs) | SMALL | {"num_layers": layers}
    return LMModel(device=device, dtype=torch.float32, **settings).eval()


def main() -> None:
    quiet_process()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/distill_memory.json"))
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    record = environment(options.seed, "bfloat16")
    lines = []
    for layers, frames in ((2, 500), (2, 1000), (4, 1000)):
        real = profiled(small(layers, "cpu"), frames)
        shapes = counted(small(layers, "meta"), frames, fused_kernel=False)
        case = f"width 128, {layers} layers, {frames} frames"
        lines += [
            Line(f"{case}: peak of a lesson, profiled on the CPU", real / 1e6, "MB"),
            Line(f"{case}: counted on meta tensors", shapes / 1e6, "MB"),
            Line(f"{case}: counted off profiled", abs(shapes / real - 1), "", 0.05),
        ]
    lm = get_moshi_lm(None, device="meta", dtype=torch.bfloat16)
    weights = sum(p.numel() * p.element_size() for p in lm.parameters())
    # Layer after layer lets go of what it held: two have the peak of all, as measured above.
    two = get_moshi_lm(
        None, device="meta", dtype=torch.bfloat16, lm_kwargs_overrides={"num_layers": 2}
    )
    activations = counted(two, options.frames, fused_kernel=True)
    ttt_cache.patch(lm)
    trained = sum(p.numel() for p in ttt_cache.adapter_parameters(lm))
    memory = 4 * 4 * trained  # weights, gradients and two moments, float32
    total = weights + activations + memory
    case = f"Moshi 7B, 32 layers, bfloat16, {options.frames} frames"
    lines += [
        Line(f"{case}: weights", weights / 1e9, "GB"),
        Line(f"{case}: adapter, its gradients and moments", memory / 1e9, "GB"),
        Line(f"{case}: peak of a lesson", activations / 1e9, "GB"),
        Line(f"{case}: together", total / 1e9, "GB", LIMIT),
    ]
    settings = {"frames": options.frames, "small": SMALL}
    publish("distill_memory", options.out, record, settings, lines)


if __name__ == "__main__":
    main()
