"""A token taken in by one head's network: one pass through W1, one through F, one through G.

F is walked by blocks of columns: a column's error, its part of the gradient by phi and its update
need that column alone. W1 and its gradient G are walked by bands of rows, of which each needs one
entry of the key. A tile is asked for before the one before it is worked on, and the first of each
matrix before all else: trips to memory behind each other would take longer than the arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constant import constexpr
from .memory_tiles import CUBIC, EPS, SLOPE, entries, finite, gelu_share, load_tile, store_tile


@triton.jit
def feed(token, bias, w, w_0, g, f, f_0, head, fed, s: constexpr):
    """Take in the features at `token`; with a row's first token `w_0` and `f_0` are the weights."""
    begins = fed == 1
    opens = (fed - 1) % s.chunk == 0
    w_from, f_from = tl.where(begins, w_0, w), tl.where(begins, f_0, f)
    f_tile = block(f_from, 0, s)
    if not s.linear:
        w_tile, g_tile = band(w_from, 0, True, s), band(g, 0, not opens, s)
    key, value = token + head * s.d, token + (s.heads + head) * s.d
    k = entries(key, tl.arange(0, s.block_d), s.d)
    v = entries(value, tl.arange(0, s.block_d), s.d)
    unit_k = tl.rsqrt(tl.sum(k * k, 0) + EPS)
    norm_v = tl.rsqrt(tl.sum(v * v, 0) / s.d + EPS)
    logit = finite(tl.load(token + 2 * s.heads * s.d + head).to(tl.float32))
    eta = tl.sigmoid(logit + tl.load(bias + head).to(tl.float32))
    if s.linear:
        learn(k * unit_k, value, norm_v, eta, f_tile, f_from, f, s)
    else:
        z = hidden(key, unit_k, w_tile, w_from, w, begins, s)
        share = gelu_share(z)
        length = tl.rsqrt(tl.sum(z * share * z * share, 0) + EPS)
        phi = z * share * length
        d_phi = learn(phi, value, norm_v, eta, f_tile, f_from, f, s)
        d_gelu = (d_phi - phi * tl.sum(phi * d_phi, 0)) * length
        bend = z * share * (1 - share) * SLOPE * (1 + 3 * CUBIC * z * z)
        gather(key, unit_k, d_gelu * (share + bend), g_tile, g, opens, s)


@triton.jit
def hidden(key, unit_k, w_tile, w_from, w, begins, s: constexpr):
    """k W1, `[block_n]`; with a row's first token W1 becomes version 0."""
    block_n: constexpr = s.block_n
    height: constexpr = s.tile // block_n
    total = tl.zeros([height, block_n], tl.float32)
    for i in range(0, s.block_d, height):
        ahead = band(w_from, i + height, True, s)
        rows = i + tl.arange(0, height)
        total += w_tile * (entries(key, rows, s.d) * unit_k)[:, None]
        store_tile(w, w_tile, rows, tl.arange(0, block_n), s.d, s.n, begins)
        w_tile = ahead
    return tl.sum(total, 0)


@triton.jit
def learn(phi, value, norm_v, eta, f_tile, f_from, f, s: constexpr):
    """The delta rule on F; returns the gradient of the loss by phi at the F before it."""
    block_n: constexpr = s.block_n
    length: constexpr = s.tile // block_n
    back = tl.zeros([block_n, length], tl.float32)
    for j in range(0, s.block_d, length):
        ahead = block(f_from, j + length, s)
        columns = j + tl.arange(0, length)
        error = entries(value, columns, s.d) * norm_v - tl.sum(phi[:, None] * f_tile, 0)
        back -= f_tile * error[None, :]
        f_tile += phi[:, None] * (eta * error)[None, :]
        store_tile(f, f_tile, tl.arange(0, block_n), columns, s.n, s.d)
        f_tile = ahead
    return tl.sum(back, 1)


@triton.jit
def gather(key, unit_k, d_z, g_tile, g, opens, s: constexpr):
    """Add the outer product of key and `d_z` to G, which is zero where a chunk opens."""
    height: constexpr = s.tile // s.block_n
    for i in range(0, s.block_d, height):
        ahead = band(g, i + height, not opens, s)
        rows = i + tl.arange(0, height)
        k = entries(key, rows, s.d) * unit_k
        g_tile += k[:, None] * d_z[None, :]
        store_tile(g, g_tile, rows, tl.arange(0, s.block_n), s.d, s.n)
        g_tile = ahead


@triton.jit
def band(matrix, i, wanted, s: constexpr):
    """Rows of a `[d, n]` matrix from the i-th; zeros if they are not wanted."""
    rows = i + tl.arange(0, s.tile // s.block_n)
    return load_tile(matrix, rows, tl.arange(0, s.block_n), s.d, s.n, wanted)


@triton.jit
def block(matrix, j, s: constexpr):
    """Columns of an `[n, d]` matrix from the j-th."""
    columns = j + tl.arange(0, s.tile // s.block_n)
    return load_tile(matrix, tl.arange(0, s.block_n), columns, s.n, s.d)
