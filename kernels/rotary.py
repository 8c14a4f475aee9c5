"""Rotary positions (arXiv 2104.09864, section 3.2.2), by the angles of Moshi's own embedding."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .constant import constexpr
from .tile import load_vector


def frequencies(head_dim: int, max_period: float, device: torch.device | str | None) -> Tensor:
    """What positions are multiplied by, float32 `[D / 2]`.

    Moshi's expression on Moshi's device: an angle is this times the position, so the last bit of it
    is a tenth of a radian after a million frames.
    """
    pairs = torch.arange(head_dim // 2, device=device, dtype=torch.float32)
    return torch.exp(pairs * (-math.log(max_period) * 2 / head_dim))


@triton.jit
def load_turned(x_ptr, position, frequencies_ptr, s: constexpr):
    """One head's vector turned to a position: float32 `[block_d]`, zero behind its end.

    `s.rope` is `interleaved` (pairs 2i and 2i + 1), `halves` (i and i + D / 2) or `none`.
    """
    x = load_vector(x_ptr, s.d, s.block_d)
    if s.rope != "none":
        d = tl.arange(0, s.block_d)
        if s.rope == "interleaved":
            pair, partner, first = d // 2, d ^ 1, d % 2 == 0
        else:
            pair, partner, first = d % (s.d // 2), (d + s.d // 2) % s.d, d < s.d // 2
        y = tl.load(x_ptr + partner, mask=d < s.d, other=0).to(tl.float32)
        angle = tl.load(frequencies_ptr + pair, mask=d < s.d, other=0) * position.to(tl.float32)
        x = x * tl.cos(angle) + tl.where(first, -y, y) * tl.sin(angle)
    return x
