"""A chunk taken in by one head's network: what the scan does, and what its way back does again.

The hidden units are walked some at a time: a unit's feature needs its column of W1 alone, and its
row of F is updated by itself. What a pass leaves for the next one (pre-activations, gradients by
the features) goes through memory, `[L, n]`; the caller puts barriers between.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constant import constexpr
from .memory_scan_tiles import by_token, by_width, inverse, lower, product
from .memory_tiles import CUBIC, EPS, SLOPE, gelu_share, load_tile, store_tile


@triton.jit
def predict(k, v, eta, w, f, z_to, s: constexpr):
    """Look at the tokens with W1 as it is and F as it runs.

    Returns:
        1 / |gelu(z)| of each token; what each feature has of those before, and the inverse of the
        delta rule's triangle, `[block_l, block_l]`; the errors, `[block_l, block_d]`.
    """
    token, width = tl.arange(0, s.block_l), tl.arange(0, s.block_d)
    keys = by_width(k, s)
    square = tl.zeros([s.block_l], tl.float32)
    gram = tl.zeros([s.block_l, s.block_l], tl.float32)
    answer = tl.zeros([s.block_l, s.block_d], tl.float32)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        if s.linear:
            a = load_tile(k, token, units, s.tokens, s.d)
        else:
            z = product(keys, load_tile(w, width, units, s.d, s.n))
            store_tile(z_to, z, token, units, s.tokens, s.n)
            a = z * gelu_share(z)
            square += tl.sum(a * a, 1)
        gram = product(a, tl.trans(a), gram)
        answer = product(a, load_tile(f, units, width, s.n, s.d), answer)
    rho = tl.full([s.block_l], 1.0, tl.float32) if s.linear else tl.rsqrt(square + EPS)
    gram = lower(gram * rho[:, None] * rho[None, :], s)
    solve = inverse(gram * by_token(eta, s)[None, :], s)
    error = product(solve, by_width(v, s) - answer * rho[:, None])
    return rho, gram, solve, error


@triton.jit
def learn(k, eta, f, f_to, z, d_phi_to, rho, error, s: constexpr, kept: constexpr):
    """The delta rule on F, and the gradient of the loss by the features at the running F.

    Args:
        kept: whether the new F is stored.

    Returns:
        feature . gradient of each token; |F|^2 after all.
    """
    token, width = tl.arange(0, s.block_l), tl.arange(0, s.block_d)
    rates = by_token(eta, s)
    rated = error * rates[:, None]
    coupling = lower(product(error, tl.trans(error)), s) * rates[None, :]
    along = tl.zeros([s.block_l], tl.float32)
    square = tl.zeros([s.units], tl.float32)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        if s.linear:
            phi = load_tile(k, token, units, s.tokens, s.d)
        else:
            phi = features(z, rho, units, s)
        weight = load_tile(f, units, width, s.n, s.d)
        if not s.linear:
            d_phi = -product(coupling, phi, product(error, tl.trans(weight)))
            along += tl.sum(phi * d_phi, 1)
            store_tile(d_phi_to, d_phi, token, units, s.tokens, s.n)
        weight = product(tl.trans(phi), rated, weight)
        square += tl.sum(weight * weight, 1)
        if kept:
            store_tile(f_to, weight, units, width, s.n, s.d)
    return along, tl.sum(square, 0)


@triton.jit
def features(z, rho, units, s: constexpr):
    """Some units' features of each token, from what `predict` stored."""
    found = load_tile(z, tl.arange(0, s.block_l), units, s.tokens, s.n)
    return found * gelu_share(found) * rho[:, None]


@triton.jit
def slopes(z):
    """First and second derivative of gelu."""
    share = gelu_share(z)
    steep = share * (1 - share)
    turn = SLOPE * (1 + 3 * CUBIC * z * z)
    bend = (1 - 2 * share) * turn * turn + SLOPE * 6 * CUBIC * z
    return share + z * steep * turn, steep * (2 * turn + z * bend)


@triton.jit
def through_features(z, d_phi, rho, along, units, s: constexpr):
    """What the gradient by some units' features is made of.

    Returns:
        pre-activations; features; the gradient at right angles to the features; all `[L, units]`.
    """
    token = tl.arange(0, s.block_l)
    z = load_tile(z, token, units, s.tokens, s.n)
    phi = z * gelu_share(z) * rho[:, None]
    return z, phi, load_tile(d_phi, token, units, s.tokens, s.n) - phi * along[:, None]


@triton.jit
def shrinking(square, closes, s: constexpr):
    """What F is multiplied by where a chunk closes; 1 where it does not."""
    return tl.where(closes, tl.minimum(s.cap * tl.rsqrt(square + EPS), 1.0), 1.0)


@triton.jit
def step_length(square, closes, s: constexpr):
    """What a bounded step along the mean gradient is of the total, but for its rate."""
    length = tl.rsqrt(1 + square / (s.chunk * s.chunk)) / s.chunk
    return tl.where(closes, length, 0.0)
