"""What a chunk's tokens did, backwards.

`_unlearn` of `ttt_cache/memory/adjoint.py`, in which U and Q are the gradients by W1 and F.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constant import constexpr
from .memory_scan_again import BY_D, BY_DELTA, BY_Z, CURVE, DELTA, PHI, STEEP
from .memory_scan_tiles import by_token, by_width, product
from .memory_tiles import load_tile, store_tile


@triton.jit
def of_units(parts, which: constexpr, units, s: constexpr):
    """Of what is kept for each token and hidden unit, some units; `[block_l, units]`."""
    part = parts + which * s.tokens * s.n
    return load_tile(part, tl.arange(0, s.block_l), units, s.tokens, s.n)


@triton.jit
def pull(phi, rated, f, q, shrink, capped, parts, s: constexpr):
    """Q before the cap, and what the features take of it; returns the features times Q."""
    token, width = tl.arange(0, s.block_l), tl.arange(0, s.block_d)
    pulled = tl.zeros([s.block_l, s.block_d], tl.float32)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        some = of_units(phi, 0, units, s)
        full = product(tl.trans(some), rated, load_tile(f, units, width, s.n, s.d))
        by = load_tile(q, units, width, s.n, s.d) * shrink - full * capped
        pulled = product(some, by, pulled)
        by_phi = product(rated, tl.trans(by))
        tl.debug_barrier()
        store_tile(q, by, units, width, s.n, s.d)
        store_tile(parts + BY_Z * s.tokens * s.n, by_phi, token, units, s.tokens, s.n)
    return pulled


@triton.jit
def ungradient(parts, f, by_error, aside, s: constexpr):
    """The gradient by `delta`.

    Returns:
        what is left of the gradient by the errors; the gradient by `delta` times the features.
    """
    token, width = tl.arange(0, s.block_l), tl.arange(0, s.block_d)
    mixed = tl.zeros([s.block_l, s.block_l], tl.float32)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        phi = of_units(parts, PHI, units, s)
        by_alpha = of_units(parts, BY_D, units, s) * of_units(parts, STEEP, units, s)
        by_delta = by_alpha - phi * aside[:, None]
        store_tile(parts + BY_DELTA * s.tokens * s.n, by_delta, token, units, s.tokens, s.n)
        by_error -= product(by_delta, load_tile(f, units, width, s.n, s.d))
        mixed = product(by_delta, tl.trans(phi), mixed)
    return by_error, mixed


@triton.jit
def unpredict(
    phi, parts, f, q, by_residual, error, mixed, coupling, alongs, aside, s: constexpr
):  # fmt: skip
    """The gradient by the features, and Q before the chunk; returns features . gradient."""
    token, width = tl.arange(0, s.block_l), tl.arange(0, s.block_d)
    across = tl.zeros([s.block_l], tl.float32)
    tl.debug_barrier()
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        some = of_units(phi, 0, units, s)
        by = load_tile(q, units, width, s.n, s.d)
        by -= product(tl.trans(some), by_residual)
        by_phi = of_units(parts, BY_Z, units, s) - product(mixed, some)
        by_phi -= product(by_residual, tl.trans(load_tile(f, units, width, s.n, s.d)))
        if not s.linear:
            by_delta = of_units(parts, BY_DELTA, units, s)
            by -= product(tl.trans(by_delta), error)
            by_phi -= product(coupling, by_delta)
            by_alpha = of_units(parts, BY_D, units, s) * of_units(parts, STEEP, units, s)
            by_phi -= by_alpha * by_token(alongs, s)[:, None]
            by_phi -= of_units(parts, DELTA, units, s) * aside[:, None]
            across += tl.sum(some * by_phi, 1)
        tl.debug_barrier()
        store_tile(q, by, units, width, s.n, s.d)
        store_tile(parts + BY_Z * s.tokens * s.n, by_phi, token, units, s.tokens, s.n)
    return across


@triton.jit
def unfeature(k, parts, u, turned, across, s: constexpr):
    """The gradient by the pre-activations, and U before the chunk."""
    token, width = tl.arange(0, s.block_l), tl.arange(0, s.block_d)
    keys = tl.trans(by_width(k, s))
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        phi, steep = of_units(parts, PHI, units, s), of_units(parts, STEEP, units, s)
        by_z = of_units(parts, BY_Z, units, s) - phi * (across + turned)[:, None]
        by_z *= steep
        by_z += of_units(parts, BY_D, units, s) * of_units(parts, CURVE, units, s)
        by = product(keys, by_z, load_tile(u, width, units, s.d, s.n))
        tl.debug_barrier()
        store_tile(u, by, width, units, s.d, s.n)
        store_tile(parts + BY_Z * s.tokens * s.n, by_z, token, units, s.tokens, s.n)
