"""float32 or wider: in what the inner update and the softmax are computed, whatever the model."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.autocast import full_precision

__all__ = ["full_precision", "wide", "widened"]


def wide(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of inner arithmetic beside a model of `dtype`: float32, or float64 for that."""
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)


def widened(x: Tensor) -> Tensor:
    """`x` in the dtype of inner arithmetic."""
    return x.to(wide(x.dtype))
