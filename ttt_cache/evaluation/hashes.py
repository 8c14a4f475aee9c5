"""What tells models and adapters apart, whatever they are called."""

from __future__ import annotations

import hashlib
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ttt_cache.adapter import CONFIG_NAME, WEIGHTS_NAME
from ttt_cache.fingerprint import facts

_hashes: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def base_hash(lm: nn.Module) -> str:
    """A hash of what a model computes: how its modules are built, and its weights; nothing of a
    patch. Kept as long as the model lives: evaluation leaves both alone."""
    if lm not in _hashes:
        found = hashlib.sha256()
        for name, module in lm.named_modules():
            if "ttt_cache" not in name.split("."):
                found.update(f"{name} {facts(module)}".encode())
        for name, tensor in sorted(lm.state_dict().items()):
            if ".ttt_cache." not in name:
                found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
        _hashes[lm] = found.hexdigest()[:16]
    return _hashes[lm]


def adapter_hash(folder: Path | None) -> str | None:
    """A hash of an adapter's files; `None` of no adapter."""
    if folder is None:
        return None
    found = hashlib.sha256()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        found.update((folder / name).read_bytes())
    return found.hexdigest()[:16]
