"""The end of a chunk for one head's network: its next version, and what that answers to the slots.

All of it reads what threads of the same program have written: the caller puts barriers between.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constant import constexpr
from .memory_tiles import EPS, gelu_share, load_tile, store_tile

SOFT = tl.constexpr(1e-2)  # of an answer: one that is nearly nothing is not blown up
GROUP = tl.constexpr(16)  # slots that are answered together: the least that `tl.dot` takes
UNITS = tl.constexpr(32)  # hidden units at a time


@triton.jit
def close_hidden(w, w_0, g, step_size, s: constexpr):
    """A bounded step of W1 along its mean gradient; then its columns get their old length."""
    length: constexpr = s.tile // s.block_d
    square = squared_norm(g, s.d, s.n, s.block_d, s.block_n, s.tile)
    rate = tl.sigmoid(tl.load(step_size))
    step = rate * tl.rsqrt(1 + square / (s.chunk * s.chunk)) / s.chunk
    for j in range(0, s.block_n, length):
        rows, columns = tl.arange(0, s.block_d), j + tl.arange(0, length)
        begun = load_tile(w_0, rows, columns, s.d, s.n)
        norm = tl.sqrt(tl.sum(begun * begun, 0))
        weight = load_tile(w, rows, columns, s.d, s.n)
        weight -= step * load_tile(g, rows, columns, s.d, s.n)
        scale = norm * tl.rsqrt(tl.sum(weight * weight, 0) + EPS)
        tl.debug_barrier()  # a zero waits for no value: all have loaded what it replaces
        store_tile(w, weight * scale[None, :], rows, columns, s.d, s.n)
        store_tile(g, tl.zeros_like(weight), rows, columns, s.d, s.n)


@triton.jit
def close_last(f, s: constexpr):
    """Bring F back to the norm of a full memory if it is beyond."""
    height: constexpr = s.tile // s.block_d
    square = squared_norm(f, s.n, s.d, s.block_n, s.block_d, s.tile)
    shrink = s.cap * tl.rsqrt(square + EPS)
    if shrink < 1:
        for i in range(0, s.block_n, height):
            rows, columns = i + tl.arange(0, height), tl.arange(0, s.block_d)
            weight = load_tile(f, rows, columns, s.n, s.d)
            store_tile(f, weight * shrink, rows, columns, s.n, s.d)


@triton.jit
def publish(slots, w, f, readout, s: constexpr):
    """What the network answers to its slots `[M, d]`, into its columns of `[M, h d]`."""
    all_d = tl.arange(0, s.block_d)
    for m in range(0, s.slots, GROUP):
        some = m + tl.arange(0, GROUP)
        answer = answers(slots, some, w, f, s)
        answer *= tl.rsqrt(tl.sum(answer * answer, 1) / s.d + SOFT)[:, None]
        at = some[:, None] * (s.heads * s.d) + all_d[None, :]
        tl.store(readout + at, answer, mask=(some[:, None] < s.slots) & (all_d[None, :] < s.d))


@triton.jit
def answers(slots, some, w, f, s: constexpr):
    """`phi(unit(slot)) F` of some slots, `[GROUP, block_d]`, some features at a time."""
    block_d: constexpr = s.block_d
    all_d = tl.arange(0, block_d)
    answer = tl.zeros([GROUP, block_d], tl.float32)
    square = tl.zeros([GROUP], tl.float32)
    q = queries(slots, some, all_d, s)
    unit_q = tl.rsqrt(tl.sum(q * q, 1) + EPS)
    for j in range(0, s.block_n, UNITS):
        units = j + tl.arange(0, UNITS)
        if s.linear:
            a = queries(slots, some, units, s)
        else:
            z = unit_q[:, None] * before_gelu(slots, some, w, units, s)
            a = z * gelu_share(z)
        square += tl.sum(a * a, 1)
        weight = load_tile(f, units, all_d, s.n, s.d)
        answer = tl.dot(a, weight, answer, input_precision="tf32x3")
    return answer * tl.rsqrt(square + EPS)[:, None]


@triton.jit
def before_gelu(slots, some, w, units, s: constexpr):
    """Some slots times some columns of W1, `[GROUP, UNITS]`."""
    z = tl.zeros([GROUP, UNITS], tl.float32)
    for i in range(0, s.block_d, UNITS):
        rows = i + tl.arange(0, UNITS)
        weight = load_tile(w, rows, units, s.d, s.n)
        z = tl.dot(queries(slots, some, rows, s), weight, z, input_precision="tf32x3")
    return z


@triton.jit
def queries(slots, some, columns, s: constexpr):
    return load_tile(slots, some, columns, s.slots, s.d).to(tl.float32)


@triton.jit
def squared_norm(
    matrix,
    height: constexpr,
    width: constexpr,
    block_height: constexpr,
    block_width: constexpr,
    tile: constexpr,
):
    """The sum of a matrix's squares."""
    step: constexpr = tile // block_width
    total = tl.zeros([step, block_width], tl.float32)
    for i in range(0, block_height, step):
        rows = i + tl.arange(0, step)
        weight = load_tile(matrix, rows, tl.arange(0, block_width), height, width)
        total += weight * weight
    return tl.sum(tl.sum(total, 1), 0)
