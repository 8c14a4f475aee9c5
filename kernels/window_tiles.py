"""What the training attention's kernels share: tiles, their products, their softmax, their gate.

A `view` is a tensor as a kernel sees it: where it begins, and the strides of its rows, its heads
and its tokens; the last axis has no gaps. Exponents have base 2 within kernels, logarithms that
are kept are natural.
"""

import triton
import triton.language as tl

from .constant import constexpr
from .tile import FLOOR, load_vector
from .window_scores import LOG2E


@triton.jit
def tokens_of(view, row, head, index, there):
    """Some tokens of one head of one row, of which those that are not `there` count as zeros."""
    return view[0] + row * view[1] + head * view[2], view[3], index, there


@triton.jit
def places(rows, begin, size: constexpr, block: constexpr):
    """Where their elements from `begin` on are, `[tokens, block]`, and which of them there are."""
    d = begin + tl.arange(0, block)[None, :]
    place = rows[0] + rows[2].to(tl.int64)[:, None] * rows[1] + d
    return place, rows[3][:, None] & (d < size)


@triton.jit
def load(rows, size: constexpr, block: constexpr, s: constexpr):
    """Tokens as tensor cores take them, `[tokens, block]`."""
    found = places(rows, 0, size, block)
    return tl.load(found[0], mask=found[1], other=0).to(s.operand)


@triton.jit
def store(rows, x, size: constexpr, block: constexpr):
    """Put tokens back."""
    found = places(rows, 0, size, block)
    tl.store(found[0], x, mask=found[1])


@triton.jit
def product(a, b, total, s: constexpr):
    """`total + a b` on tensor cores; float32 in three TF32 products, which keep about 21 bits."""
    return tl.dot(a.to(s.operand), b.to(s.operand), total, input_precision="tf32x3")


@triton.jit
def products(a, b, rows_a, rows_b, size: constexpr, block: constexpr, s: constexpr):
    """`a b^T` of tokens that are loaded, and are at hand to be loaded again.

    A factor whose whole width would take too many registers is loaded again part by part; then the
    compiler drops the loads of `a` and `b` that nothing else needs.
    """
    total = tl.full([a.shape[0], b.shape[0]], 0.0, tl.float32)
    if block <= s.whole:
        return product(a, tl.trans(b), total, s)
    for begin in range(0, size, s.part):
        of_a, of_b = places(rows_a, begin, size, s.part), places(rows_b, begin, size, s.part)
        some = tl.load(of_a[0], mask=of_a[1], other=0)
        others = tl.load(of_b[0], mask=of_b[1], other=0)
        total = product(some, tl.trans(others), total, s)
    return total


@triton.jit
def no_softmax(queries: constexpr, width: constexpr):
    """Queries that have seen nothing: their highest score, mass and total."""
    top = tl.full([queries], FLOOR, tl.float32)
    return top, tl.full([queries], 0.0, tl.float32), tl.full([queries, width], 0.0, tl.float32)


@triton.jit
def take_in(top, mass, total, scores, values, s: constexpr):
    """The same after one more tile (arXiv 1805.02867; as in FlashAttention-2, arXiv 2307.08691)."""
    higher = tl.maximum(top, tl.max(scores, 1))
    kept, new = tl.exp2(top - higher), tl.exp2(scores - higher[:, None])
    mass = mass * kept + tl.sum(new, 1)
    return higher, mass, product(new, values, total * kept[:, None], s)


@triton.jit
def close(top, mass, total):
    """The natural log of the sum of exponentials, and the mean; zeros where nothing was seen."""
    any_mass = mass > 0
    some = tl.where(any_mass, mass, 1.0)
    lse = tl.where(any_mass, (top + tl.log2(some)) / LOG2E, 0.0)
    return lse, total / some[:, None]


@triton.jit
def gate_logits(q, bias_ptr, weight_ptr, head, s: constexpr):
    """As `gates.gate_logit`, of a tile of queries before RoPE, `[queries, D]`."""
    logits = tl.full([q.shape[0]], 0.0, tl.float32)
    if s.gate != "fixed":
        logits += tl.load(bias_ptr + (0 if s.gate == "layer" else head)).to(tl.float32)
    if s.gate == "query":
        weight = load_vector(weight_ptr + head * s.d, s.d, s.block_d)
        logits += tl.sum(q.to(tl.float32) * weight[None, :], 1)
    return logits
