"""Rotary positions (arXiv 2104.09864, section 3.2.2) of many tokens: one complex product a pair.

Moshi's own embedding takes the pairs apart and lays them together again, which takes seven times as
long, forward and back. It still says by which angles to turn, whatever its settings are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from moshi.modules.rope import RotaryEmbedding
from torch import Tensor

Rotation = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def turned(rope: Rotation, x: Tensor, offset: Tensor) -> Tensor:
    """What `rope(x, x, offset)` makes of `x` `[B, H, T, D]`, to the last bits of float32.

    Args:
        offset: position of the first of the T tokens, `[B]`.
    """
    # Moshi rounds to float32 here: in float64, where more digits are compared, it turns by itself.
    if not isinstance(rope, RotaryEmbedding) or x.dtype == torch.float64:
        return rope(x, x[:, :1], offset)[0]
    turn, wide = _turn(rope, x, offset), x.float()
    if rope.interleave:
        pairs = torch.view_as_complex(_even(wide).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
    pairs = torch.complex(*wide.chunk(2, dim=-1)) * turn
    return torch.cat([pairs.real, pairs.imag], dim=-1).to(x.dtype)


def _even(x: Tensor) -> Tensor:
    """`x` in memory where its last axis is a row of pairs; nearly always it is."""
    *before, last = x.stride()
    if last == 1 and not any(step % 2 for step in (*before, x.storage_offset())):
        return x
    return x.clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def _turn(rope: RotaryEmbedding, x: Tensor, offset: Tensor) -> Tensor:
    """What pairs are multiplied by, `[B, 1, T, D / 2]`: what becomes of pairs of 1 and 0."""
    rows, _, length, width = x.shape
    ones = torch.zeros(rows, 1, length, width, device=x.device)
    ones[..., :: 2 if rope.interleave else 1][..., : width // 2] = 1
    found, _ = rope(ones, ones, offset)
    if rope.interleave:
        return torch.view_as_complex(found.unflatten(-1, (-1, 2)))
    return torch.complex(*found.chunk(2, dim=-1))
