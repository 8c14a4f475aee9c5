"""How window and memory share a query: the table of gates in `docs/semantics.md`."""

import triton
import triton.language as tl

from .constant import constexpr
from .tile import load_vector


@triton.jit
def gate_logit(q_ptr, bias_ptr, weight_ptr, head, s: constexpr):
    """What is learned of a gate for one query: a scalar of its layer or head, a function of q.

    `bias_ptr` is `[1]` for `layer`, else `[H]`; `weight_ptr` `[H, D]` for `query` alone. With
    `fixed` nothing is learned.
    """
    if s.gate == "fixed":
        return 0.0
    logit = tl.load(bias_ptr + (0 if s.gate == "layer" else head)).to(tl.float32)
    if s.gate == "query":
        q = load_vector(q_ptr, s.d, s.block_d)
        logit += tl.sum(q * load_vector(weight_ptr + head * s.d, s.d, s.block_d), 0)
    return logit


@triton.jit
def shares(recent, memory, logit, alpha, written, s: constexpr):
    """What the totals of window and memory are multiplied by.

    Args:
        recent, memory: softmaxes `(top, mass, total)` as `tile.fold` leaves them.
        logit: that of `gate_logit`; `fixed` has `alpha` instead.
        written: a memory that is not has share 0.
    """
    if s.gate == "joint":
        top = tl.where(written, memory[0] + logit, float("-inf"))
        highest = tl.maximum(recent[0], top)
        of_recent, of_memory = tl.exp(recent[0] - highest), tl.exp(top - highest)
        whole = recent[1] * of_recent + memory[1] * of_memory
        return of_recent / whole, of_memory / whole
    if s.gate == "residual":
        # tanh, which the interpreter does not have
        of_recent, of_memory = 1.0, 2 * tl.sigmoid(2 * logit) - 1
    elif s.gate == "fixed":
        of_recent, of_memory = alpha, 1 - alpha
    else:
        of_recent, of_memory = tl.sigmoid(logit), tl.sigmoid(-logit)
    of_recent = tl.where(written, of_recent, 1.0)
    return of_recent / recent[1], tl.where(written, of_memory / memory[1], 0.0)
