"""The kernel of `memory_step`: one program for each row and memory head.

What matters only where a chunk ends stands behind a branch on the program's own row, so a row
that waits, or is masked out, costs nothing but its count. Programs share nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constant import constexpr
from .memory_close import close_hidden, close_last, publish
from .memory_feed import feed


@triton.jit
def memory_step_kernel(
    features,  # [B, F]
    features_row,
    count,  # [B]
    mask,  # [B]
    bias,  # [h]
    slots,  # [h, M, d]
    first_0,  # [h, d, n]
    last_0,  # [h, n, d]
    step_size,  # [1, h]
    waiting,  # [B, 1, N, F]
    first,  # [B, h, d, n]
    gradient,  # [B, h, d, n]
    last,  # [B, h, n, d]
    readout,  # [B, M, h d]
    s: constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    before = tl.load(count + row)
    if tl.load(mask + row):
        new = features + row * features_row
        leaving = new
        if s.wait:
            leaving = waiting + (row * s.wait + before % s.wait) * s.width
        fed = before + 1 - s.wait
        if fed > 0:
            start = head * s.n * s.d
            here = row * s.heads * s.n * s.d + start
            w, g, f = first + here, gradient + here, last + here
            feed(leaving, bias, w, first_0 + start, g, f, last_0 + start, head, fed, s)
            if fed % s.chunk == 0:
                tl.debug_barrier()
                if not s.linear:
                    close_hidden(w, first_0 + start, g, step_size + head, s)
                close_last(f, s)
                tl.debug_barrier()
                out = readout + row * s.slots * s.heads * s.d + head * s.d
                publish(slots + head * s.slots * s.d, w, f, out, s)
        if s.wait:
            tl.debug_barrier()  # until here the slot was the leaving token's
            keep(leaving, new, head, s)


@triton.jit
def keep(slot, new, head, s: constexpr):
    """Let the new token wait: this head's part of its features."""
    index = tl.arange(0, s.block_d)
    inside = index < s.d
    kept = slot.dtype.element_ty
    for part in range(2):
        at = (part * s.heads + head) * s.d + index
        tl.store(slot + at, tl.load(new + at, mask=inside).to(kept), mask=inside)
    at = 2 * s.heads * s.d + head
    tl.store(slot + at, tl.load(new + at).to(kept))
