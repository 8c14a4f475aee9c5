"""float32 or wider: in what the inner update and the softmax are computed, whatever the model."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def wide(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of inner arithmetic beside a model of `dtype`: float32, or float64 for that."""
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)


def widened(x: Tensor) -> Tensor:
    """`x` in the dtype of inner arithmetic."""
    return x.to(wide(x.dtype))


def full_precision(like: Tensor) -> AbstractContextManager:
    """A context in which autocast does not narrow what happens on the device of `like`."""
    if not torch.amp.is_autocast_available(like.device.type):
        return nullcontext()
    return torch.autocast(like.device.type, enabled=False)
