"""The matrix products around the training attention, one matrix for each key head.

Tensors are `[B, T, H, *]` in memory, heads of a token side by side, seen as `[B, H, T, *]`: so a
head of all rows and tokens is one matrix with equal steps between its lines, which needs no copy.
"""

from __future__ import annotations

import torch
from torch import Tensor


def side_by_side(like: Tensor, tokens: int, heads: int, width: int) -> Tensor:
    """An empty `[B, heads, tokens, width]`, heads of a token side by side."""
    return like.new_empty(like.shape[0], tokens, heads, width).transpose(1, 2)


def add_by_heads(out: Tensor, x: Tensor, weight: Tensor, kept: bool, scale: float = 1.0) -> None:
    """`out = kept out + scale x W`, in place: `[B, H, T, I]` by `[Hkv, I, J]`, `out` side by side.

    Scaled before it is rounded: float16 would overflow before a later scale brings it back.
    """
    for target, given in zip(_matrices(out, weight), _matrices(x, weight), strict=True):
        target.baddbmm_(given, weight, beta=int(kept), alpha=scale)


def between_heads(x: Tensor, dy: Tensor, like: Tensor) -> Tensor:
    """`x^T dy` over rows, tokens and the heads of a key head: the gradient of a weight `like`."""
    pairs = zip(_matrices(x, like), _matrices(dy, like), strict=True)
    parts = [torch.bmm(given.transpose(1, 2), back) for given, back in pairs]
    if len(parts) == 1:
        return parts[0]
    return torch.stack(parts).sum(0, dtype=torch.float32).to(like.dtype)


def _matrices(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """`[B, H, T, *]` as `[Hkv, B T, *]`, one for each of the R heads of a key head."""
    lines = x.transpose(1, 2).flatten(0, 1)  # [B T, H, *]
    return lines.unflatten(1, (weight.shape[0], -1)).permute(2, 1, 0, 3).unbind()
