"""What tells models apart without reading all of their weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from moshi.modules.transformer import StreamingMultiheadAttention
from torch import Tensor, nn

from .patched import SLOT

SAMPLES = 256  # values of each tensor
STRIDE = 2_654_435_761  # a prime (Knuth's): no two samples meet, nor do they follow rows or columns


def structure(root: nn.Module) -> str:
    """A hash of how a model is built: its modules, and the names, dtypes and shapes of its tensors;
    nothing of a patch."""
    found = hashlib.sha256()
    for name, module in root.named_modules():
        if SLOT not in name.split("."):
            found.update(f"{name} {facts(module)}".encode())
    for name, tensor in tensors_of(root, adapter=False):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    return found.hexdigest()[:16]


def facts(module: nn.Module) -> list[tuple[str, str]]:
    """What a module is built with, in its public attributes: Moshi's config (heads, context,
    delays, the period of its rotations, eps of a norm, an activation) is nowhere else."""
    found = {name: repr(value) for name, value in vars(module).items() if _plain(value)}
    if (activation := getattr(module, "activation", None)) is not None:
        found["activation"] = getattr(activation, "__name__", type(activation).__name__)
    if not isinstance(module, StreamingMultiheadAttention):  # which a patch makes one of its own
        found["class"] = type(module).__name__
    return sorted((n, v) for n, v in found.items() if n[0] != "_" and n != "training")


def _plain(value: Any) -> bool:
    """Whether a value says the same of itself in every process."""
    if isinstance(value, (list, tuple)):
        return all(_plain(item) for item in value)
    return isinstance(value, (bool, int, float, str, torch.dtype, type(None)))


@torch.no_grad()
def weights(root: nn.Module, adapter: bool = False) -> str:
    """A hash of 256 values of every tensor of a model, or of its patch alone.

    Training and fusing change nearly every value, so a sample tells; that 15 GB are not read for
    each session is worth not noticing a single other number. Tensors on the `meta` device have no
    values, and are told apart by name, dtype and shape.
    """
    found, values = hashlib.sha256(), []
    for name, tensor in tensors_of(root, adapter):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel() and not tensor.is_meta:
            sample = tensor.reshape(-1)[_sample(tensor.numel(), tensor.device)]
            values.append(sample.contiguous().view(torch.uint8))
    for device in sorted({str(value.device) for value in values}):  # one transfer for each
        there = [value for value in values if str(value.device) == device]
        found.update(torch.cat(there).cpu().numpy().data)
    return found.hexdigest()[:16]


def tensors_of(root: nn.Module, adapter: bool) -> Iterator[tuple[str, Tensor]]:
    """Weights and buffers by name, of the patch or of all else."""
    for name, tensor in sorted(root.state_dict().items()):
        if isinstance(tensor, Tensor) and (SLOT in name.split(".")) is adapter:
            yield name, tensor


@lru_cache(maxsize=256)  # a model has few sizes
def _sample(size: int, device: torch.device) -> Tensor:
    picked = torch.arange(min(size, SAMPLES)) * STRIDE % size
    return picked.to(device)
