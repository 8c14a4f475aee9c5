"""Rotary positions (arXiv 2104.09864, section 3.2.2): one complex product for a pair of features.

Moshi's own embedding takes the pairs apart and lays them together again. For many tokens that takes
seven times as long, forward and back; for one token it is 24 operations instead of 10.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeGuard

import torch
from moshi.modules.rope import RotaryEmbedding
from torch import Tensor

Rotation = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def turned(rope: Rotation, x: Tensor, offset: Tensor) -> Tensor:
    """What `rope(x, x, offset)` makes of `x` `[B, H, T, D]`, to the last bits of float32.

    Args:
        offset: position of the first of the T tokens, `[B]`.
    """
    if not _known(rope, x):
        return rope(x, x[:, :1], offset)[0]
    return _product(x, _turns(rope, x, offset), rope.interleave)


def both_turned(rope: Rotation, q: Tensor, k: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """What `rope(q, k, offset)` makes of them, likewise; the angles are made once."""
    if not _known(rope, q):
        return rope(q, k, offset)
    turns = _turns(rope, q, offset)
    return _product(q, turns, rope.interleave), _product(k, turns, rope.interleave)


def _known(rope: Rotation, x: Tensor) -> TypeGuard[RotaryEmbedding]:
    """Whether a rotation is Moshi's own, in a precision that is as wide as Moshi's."""
    # Moshi rounds to float32: in float64, where more digits are compared, it turns by itself.
    return type(rope) is RotaryEmbedding and x.dtype != torch.float64


def _product(x: Tensor, turns: Tensor, interleave: bool) -> Tensor:
    """`x` with its pairs turned, `[B, H, T, D]`."""
    wide = x.float()
    if interleave:
        pairs = torch.view_as_complex(_even(wide).unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)
    pairs = torch.complex(*wide.chunk(2, dim=-1)) * turns
    return torch.cat([pairs.real, pairs.imag], dim=-1).to(x.dtype)


def _even(x: Tensor) -> Tensor:
    """`x` in memory where its last axis is a row of pairs; nearly always it is."""
    *before, last = x.stride()
    if last == 1 and not any(step % 2 for step in (*before, x.storage_offset())):
        return x
    return x.clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def _turns(rope: RotaryEmbedding, x: Tensor, offset: Tensor) -> Tensor:
    """What pairs are multiplied by, `[B, 1, T, D / 2]`, in the arithmetic of Moshi's own."""
    length, width = x.shape[-2:]
    factory = {"device": x.device, "dtype": torch.float32}
    pair = torch.arange(width // 2, **factory)
    angles = torch.exp(pair * (-math.log(rope.max_period) * 2 / width))
    position = offset.float().view(-1, 1, 1, 1)
    if length > 1:
        position = position + torch.arange(length, **factory)[:, None]
    angles = angles * position
    return torch.complex(torch.cos(angles), torch.sin(angles))
