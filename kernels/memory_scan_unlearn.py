"""What a chunk's tokens did, backwards.

`_unlearn` of `ttt_cache/memory/adjoint.py`, in which U and Q are the gradients by W1 and F.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constant import constexpr
from .memory_scan_again import BY_D, BY_DELTA, BY_Z, CURVE, DELTA, PHI, STEEP, D, of_units
from .memory_scan_tiles import (
    by_token,
    by_width,
    product,
    times_columns,
    times_rows,
    zero_matrix,
    zero_vector,
)
from .memory_tiles import load_tile, store_tile


@triton.jit
def pull(phi, f, s: constexpr):
    """The features times an `[n, d]` matrix, `[block_l, block_d]`."""
    width = tl.arange(0, s.block_d)
    pulled = zero_matrix(s.block_l, s.block_d)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        weight = load_tile(f, units, width, s.n, s.d)
        pulled = product(of_units(phi, 0, units, s), weight, pulled)
    return pulled


@triton.jit
def ungradient(k, parts, by_total, s: constexpr):
    """The gradient by what the tokens added to W1's gradient.

    Returns:
        of each token, what the gradient by `alpha` is along the features, and that by `d` along d.
    """
    token = tl.arange(0, s.block_l)
    aside, turned = zero_vector(s.block_l), zero_vector(s.block_l)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        by_d = times_columns(k, by_total, units, s)
        store_tile(parts + BY_D * s.tokens * s.n, by_d, token, units, s.tokens, s.n)
        turned += tl.sum(by_d * of_units(parts, D, units, s), 1)
        along = of_units(parts, PHI, units, s) * of_units(parts, STEEP, units, s)
        aside += tl.sum(by_d * along, 1)
    return aside, turned


@triton.jit
def unalign(parts, aside, s: constexpr):
    """The gradient by `delta`."""
    token = tl.arange(0, s.block_l)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        by_alpha = of_units(parts, BY_D, units, s) * of_units(parts, STEEP, units, s)
        by_delta = by_alpha - of_units(parts, PHI, units, s) * aside[:, None]
        store_tile(parts + BY_DELTA * s.tokens * s.n, by_delta, token, units, s.tokens, s.n)


@triton.jit
def unpredict(parts, eta, f, q, by_residual, error, s: constexpr):
    """The gradient by the features, as far as Q and F make it."""
    token = tl.arange(0, s.block_l)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        by_phi = times_rows(error, q, units, s) * by_token(eta, s)[:, None]
        by_phi -= times_rows(by_residual, f, units, s)
        store_tile(parts + BY_Z * s.tokens * s.n, by_phi, token, units, s.tokens, s.n)


@triton.jit
def uncouple(phi, parts, mixed, coupling, alongs, aside, s: constexpr):
    """The rest of it, as tokens make it of each other; returns features . gradient."""
    token = tl.arange(0, s.block_l)
    across = zero_vector(s.block_l)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        some = of_units(phi, 0, units, s)
        by_phi = of_units(parts, BY_Z, units, s) - product(mixed, some)
        if not s.linear:
            by_phi -= product(coupling, of_units(parts, BY_DELTA, units, s))
            by_alpha = of_units(parts, BY_D, units, s) * of_units(parts, STEEP, units, s)
            by_phi -= by_alpha * by_token(alongs, s)[:, None]
            by_phi -= of_units(parts, DELTA, units, s) * aside[:, None]
            across += tl.sum(some * by_phi, 1)
        tl.debug_barrier()
        store_tile(parts + BY_Z * s.tokens * s.n, by_phi, token, units, s.tokens, s.n)
    return across


@triton.jit
def unlearn(phi, parts, q, by_residual, error, s: constexpr):
    """Q before the chunk."""
    width = tl.arange(0, s.block_d)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        by = load_tile(q, units, width, s.n, s.d)
        by -= product(tl.trans(of_units(phi, 0, units, s)), by_width(by_residual, s))
        if not s.linear:
            by_delta = of_units(parts, BY_DELTA, units, s)
            by -= product(tl.trans(by_delta), by_width(error, s))
        tl.debug_barrier()
        store_tile(q, by, units, width, s.n, s.d)


@triton.jit
def unfeature(k, parts, u, turned, across, s: constexpr):
    """The gradient by the pre-activations, and U before the chunk."""
    token, width = tl.arange(0, s.block_l), tl.arange(0, s.block_d)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        phi, steep = of_units(parts, PHI, units, s), of_units(parts, STEEP, units, s)
        by_z = of_units(parts, BY_Z, units, s) - phi * (across + turned)[:, None]
        by_z *= steep
        by_z += of_units(parts, BY_D, units, s) * of_units(parts, CURVE, units, s)
        by = product(tl.trans(by_width(k, s)), by_z, load_tile(u, width, units, s.d, s.n))
        tl.debug_barrier()
        store_tile(u, by, width, units, s.d, s.n)
        store_tile(parts + BY_Z * s.tokens * s.n, by_z, token, units, s.tokens, s.n)
