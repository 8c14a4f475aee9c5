"""What programs that share a query hand to the last of them, which folds it and answers."""

import triton
import triton.language as tl

from .constant import constexpr
from .tile import FLOOR, fold


@triton.jit
def arrive(ticket_ptr, expected: constexpr):
    """Whether all `expected` programs have now come here; true in the last of them only.

    What a program stored before, the last one sees after: the barrier puts the stores of all
    threads before the one thread that counts, and counting releases and acquires. The last one
    winds the ticket, an int32 that starts at 0, back for the next launch.
    """
    tl.debug_barrier()
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last


@triton.jit
def store_softmax(sums_ptr, totals_ptr, index, softmax, stores, size: constexpr, block: constexpr):
    """Leave one softmax as number `index` of `sums` `[*, 2]` and `totals` `[*, size]`, float32."""
    d = tl.arange(0, block)
    tl.store(totals_ptr + index * size + d, softmax[2], mask=(d < size) & stores)
    tl.store(sums_ptr + index * 2, softmax[0], mask=stores)
    tl.store(sums_ptr + index * 2 + 1, softmax[1], mask=stores)


@triton.jit
def load_softmax(
    sums_ptr, totals_ptr, first, count: constexpr, lanes: constexpr,
    size: constexpr, block: constexpr,
):  # fmt: skip
    """Those from `first` on, folded; `lanes` is `count` or the power of two above it."""
    lane, d = tl.arange(0, lanes), tl.arange(0, block)[None, :]
    index, there = first + lane, lane < count
    # Past the first-level cache, which may hold what was there before.
    top = tl.load(sums_ptr + index * 2, mask=there, other=FLOOR, cache_modifier=".cg")
    mass = tl.load(sums_ptr + index * 2 + 1, mask=there, other=0, cache_modifier=".cg")
    place, inside = index[:, None] * size + d, there[:, None] & (d < size)
    total = tl.load(totals_ptr + place, mask=inside, other=0, cache_modifier=".cg")
    return fold(top, mass, total)
