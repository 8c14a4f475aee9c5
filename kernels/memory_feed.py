"""A token taken in by one head's network: one pass through W1, one through F, one through G.

F is walked by blocks of columns: a column's error, its part of the gradient by phi and its update
need that column alone. W1 and its gradient G are walked by bands of rows, of which each needs one
entry of the key. The first tile of each is asked for at once (all of it, at the default sizes):
three trips to memory behind each other would take longer than everything else.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .memory_tiles import CUBIC, EPS, SLOPE, entries, finite, gelu_share, tile_of


@triton.jit
def feed(token, bias, w, w_0, g, f, f_0, head, fed, s: tl.constexpr):
    """Take in the features at `token`; with a row's first token `w_0` and `f_0` are the weights."""
    begins = fed == 1
    f_from = tl.where(begins, f_0, f)
    f_tile = block(f_from, 0, s)
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
        opens = (fed - 1) % s.chunk == 0
        g_tile = band(g, 0, not opens, s)
        z = hidden(key, unit_k, w, w_0, begins, s)
        share = gelu_share(z)
        length = tl.rsqrt(tl.sum(z * share * z * share, 0) + EPS)
        phi = z * share * length
        d_phi = learn(phi, value, norm_v, eta, f_tile, f_from, f, s)
        d_gelu = (d_phi - phi * tl.sum(phi * d_phi, 0)) * length
        bend = z * share * (1 - share) * SLOPE * (1 + 3 * CUBIC * z * z)
        gather(key, unit_k, d_gelu * (share + bend), g_tile, g, opens, s)


@triton.jit
def hidden(key, unit_k, w, w_0, begins, s: tl.constexpr):
    """k W1, `[block_n]`; with a row's first token W1 becomes version 0."""
    block_d: tl.constexpr = s.block_d
    block_n: tl.constexpr = s.block_n
    height: tl.constexpr = s.tile // block_n
    source = tl.where(begins, w_0, w)
    total = tl.zeros([height, block_n], tl.float32)
    for i in tl.static_range(0, block_d, height):
        weight = band(source, i, True, s)
        rows = i + tl.arange(0, height)
        total += weight * (entries(key, rows, s.d) * unit_k)[:, None]
        at, inside = tile_of(rows, tl.arange(0, block_n), s.d, s.n)
        tl.store(w + at, weight, mask=inside & begins)
    return tl.sum(total, 0)


@triton.jit
def learn(phi, value, norm_v, eta, f_tile, f_from, f, s: tl.constexpr):
    """The delta rule on F; returns the gradient of the loss by phi at the F before it."""
    block_d: tl.constexpr = s.block_d
    block_n: tl.constexpr = s.block_n
    length: tl.constexpr = s.tile // block_n
    back = tl.zeros([block_n, length], tl.float32)
    for j in tl.static_range(0, block_d, length):
        if j > 0:
            f_tile = block(f_from, j, s)
        columns = j + tl.arange(0, length)
        error = entries(value, columns, s.d) * norm_v - tl.sum(phi[:, None] * f_tile, 0)
        back -= f_tile * error[None, :]
        at, inside = tile_of(tl.arange(0, block_n), columns, s.n, s.d)
        tl.store(f + at, f_tile + phi[:, None] * (eta * error)[None, :], mask=inside)
    return tl.sum(back, 1)


@triton.jit
def gather(key, unit_k, d_z, g_tile, g, opens, s: tl.constexpr):
    """Add the outer product of key and `d_z` to G, which is zero where a chunk opens."""
    block_d: tl.constexpr = s.block_d
    height: tl.constexpr = s.tile // s.block_n
    for i in tl.static_range(0, block_d, height):
        if i > 0:
            g_tile = band(g, i, not opens, s)
        rows = i + tl.arange(0, height)
        k = entries(key, rows, s.d) * unit_k
        at, inside = tile_of(rows, tl.arange(0, s.block_n), s.d, s.n)
        tl.store(g + at, g_tile + k[:, None] * d_z[None, :], mask=inside)


@triton.jit
def band(matrix, i, wanted, s: tl.constexpr):
    """Rows of a `[d, n]` matrix from the i-th; zeros if they are not wanted."""
    rows = i + tl.arange(0, s.tile // s.block_n)
    at, inside = tile_of(rows, tl.arange(0, s.block_n), s.d, s.n)
    return tl.load(matrix + at, mask=inside & wanted, other=0.0)


@triton.jit
def block(matrix, j, s: tl.constexpr):
    """Columns of an `[n, d]` matrix from the j-th."""
    columns = j + tl.arange(0, s.tile // s.block_n)
    at, inside = tile_of(tl.arange(0, s.block_n), columns, s.n, s.d)
    return tl.load(matrix + at, mask=inside, other=0.0)
