"""Scores of the training attention from products of tiles, to base 2, -inf where nothing is seen.

Index tensors say which axis of a tile are queries: `[queries, 1]` and `[1, columns]`, or the other
way round.
"""

import triton
import triton.language as tl

from .constant import constexpr
from .window_places import reads, sees

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exact_scores(products, i, j, start, history, scale, sinks: constexpr, s: constexpr):
    """Of queries i over columns j of the window, or over sinks."""
    visible = sees(i, j, start, history, sinks, s)
    return tl.where(visible, products * (scale * LOG2E), float("-inf"))


@triton.jit
def virtual_scores(
    products, absorbed, slot_bias_ptr, row, head, i, u, start, tokens, versions, s: constexpr
):
    """Of queries i over virtual tokens u; which of its version's slots that is to each query, and
    whether it reads it."""
    found = reads(i, u, start, versions, s)
    slot, read = found[0], found[1] & (i < tokens)
    query = absorbed[0] + row * absorbed[1] + head * absorbed[2]
    place = query + i.to(tl.int64) * absorbed[3] + s.lead + slot
    scores = products + tl.load(place, mask=read, other=0).to(tl.float32)
    if slot_bias_ptr is not None:
        place = slot_bias_ptr + head * s.slots + slot
        scores += tl.load(place, mask=read, other=0).to(tl.float32)
    return tl.where(read, scores * LOG2E, float("-inf")), slot, read


@triton.jit
def weigh(scores, lse):
    """Weights from scores, and the log of the sum of their exponentials, which is natural."""
    return tl.exp2(scores - lse * LOG2E)
