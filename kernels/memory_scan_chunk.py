"""A chunk taken in by one head's network: what the scan does, and what its way back does again.

The hidden units are walked some at a time: a unit's feature needs its column of W1 alone, and its
row of F is updated by itself. What a pass leaves for the next one (pre-activations, errors,
gradients by the features) goes through memory, and every pass loads what it needs: kept as
operands of products, which each warp holds whole, twice, they would not fit in registers. The
caller puts barriers between passes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constant import constexpr
from .memory_scan_tiles import (
    by_token,
    by_width,
    inverse,
    lower,
    overlaps,
    product,
    times_columns,
    times_rows,
    zero_matrix,
    zero_vector,
)
from .memory_tiles import CUBIC, EPS, SLOPE, gelu_share, load_tile, store_tile


@triton.jit
def predict(k, v, eta, w, f, a_to, z_to, error_to, s: constexpr):
    """Look at the tokens with W1 as it is and F as it runs.

    Pre-activations and errors are stored, and gelu of the former, `[L, n]`.

    Returns:
        1 / |gelu(z)| of each token; what each feature has of those before, and the inverse of the
        delta rule's triangle, `[block_l, block_l]`.
    """
    token, width = tl.arange(0, s.block_l), tl.arange(0, s.block_d)
    square = zero_vector(s.block_l)
    answer = zero_matrix(s.block_l, s.block_d)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        if s.linear:
            a = load_tile(k, token, units, s.tokens, s.d)
        else:
            z = times_columns(k, w, units, s)
            a = z * gelu_share(z)
            store_tile(z_to, z, token, units, s.tokens, s.n)
            store_tile(a_to, a, token, units, s.tokens, s.n)
            square += tl.sum(a * a, 1)
        answer = product(a, load_tile(f, units, width, s.n, s.d), answer)
    rho = zero_vector(s.block_l) + 1 if s.linear else tl.rsqrt(square + EPS)
    tl.debug_barrier()
    gram = overlaps(a_to, a_to, s.n, s.block_n, s)
    gram = lower(gram * rho[:, None] * rho[None, :], s)
    solve = inverse(gram * by_token(eta, s)[None, :], s)
    error = product(solve, by_width(v, s) - answer * rho[:, None])
    store_tile(error_to, error, token, width, s.tokens, s.d)
    return rho, gram, solve


@triton.jit
def between(error, s: constexpr):
    """What each token's error has of those before it."""
    return lower(overlaps(error, error, s.d, s.block_d, s), s)


@triton.jit
def differentiate(eta, f, a, d_phi_to, error, rho, s: constexpr):
    """The gradient of the loss by the features, each token's at the F that runs there.

    Returns:
        feature . gradient of each token.
    """
    token = tl.arange(0, s.block_l)
    coupling = between(error, s) * by_token(eta, s)[None, :]
    along = zero_vector(s.block_l)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        phi = load_tile(a, token, units, s.tokens, s.n) * rho[:, None]
        d_phi = -times_rows(error, f, units, s) - product(coupling, phi)
        along += tl.sum(phi * d_phi, 1)
        store_tile(d_phi_to, d_phi, token, units, s.tokens, s.n)
    return along


@triton.jit
def taken_in(a, scale, error, f, units, s: constexpr):
    """Some rows of F after the chunk's tokens, before its cap.

    Args:
        scale: rates of the tokens, times what makes features of `a`.
    """
    features = load_tile(a, tl.arange(0, s.block_l), units, s.tokens, s.n) * scale[:, None]
    weight = load_tile(f, units, tl.arange(0, s.block_d), s.n, s.d)
    return product(tl.trans(features), by_width(error, s), weight)


@triton.jit
def slopes(z):
    """First and second derivative of gelu."""
    share = gelu_share(z)
    steep = share * (1 - share)
    turn = SLOPE * (1 + 3 * CUBIC * z * z)
    bend = (1 - 2 * share) * turn * turn + SLOPE * 6 * CUBIC * z
    return share + z * steep * turn, steep * (2 * turn + z * bend)


@triton.jit
def through_features(a, d_phi, rho, along, units, s: constexpr):
    """Some units' features, and the gradient by them without what lies along them, by 1 / rho."""
    token = tl.arange(0, s.block_l)
    phi = load_tile(a, token, units, s.tokens, s.n) * rho[:, None]
    across = load_tile(d_phi, token, units, s.tokens, s.n) - phi * along[:, None]
    return phi, across * rho[:, None]


@triton.jit
def shrinking(square, closes, s: constexpr):
    """What F is multiplied by where a chunk closes; 1 where it does not."""
    return tl.where(closes, tl.minimum(s.cap * tl.rsqrt(square + EPS), 1.0), 1.0)


@triton.jit
def step_length(square, closes, s: constexpr):
    """What a bounded step along the mean gradient is of the total, but for its rate."""
    length = tl.rsqrt(1 + square / (s.chunk * s.chunk)) / s.chunk
    return tl.where(closes, length, 0.0)
