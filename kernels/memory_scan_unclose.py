"""The end of a chunk backwards: from the gradients by the weights after it to those before.

`_unclose` of `ttt_cache/memory/adjoint.py`, in which U and Q are the gradients by W1 and F.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constant import constexpr
from .memory_scan_again import (
    BEND,
    BY_D,
    BY_RATE,
    INVERSE,
    LENGTH,
    PHI,
    PULL,
    SCALE,
    STEEP,
    STEP,
    D,
    gathered_by,
)
from .memory_scan_tiles import by_unit, by_width, product
from .memory_scan_unlearn import of_units
from .memory_tiles import load_tile, store_tile


@triton.jit
def uncap(phi, rated, f, q_from, by_lasts, q, s: constexpr):
    """Add the gradient by this version to Q; returns its product with F as it met its cap."""
    width = tl.arange(0, s.block_d)
    dot = tl.zeros([s.units], tl.float32)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        by = load_tile(q_from, units, width, s.n, s.d) + load_tile(by_lasts, units, width, s.n, s.d)
        dot += tl.sum(taken_in(phi, rated, f, units, s) * by, 1)
        tl.debug_barrier()
        store_tile(q, by, units, width, s.n, s.d)
    return tl.sum(dot, 0)


@triton.jit
def taken_in(phi, rated, f, units, s: constexpr):
    """Some rows of F after the chunk's tokens, before its cap."""
    weight = load_tile(f, units, tl.arange(0, s.block_d), s.n, s.d)
    return product(tl.trans(of_units(phi, 0, units, s)), rated, weight)


@triton.jit
def unstep(k, parts, w, g, u_from, by_firsts, u, column, number, opens, s: constexpr):
    """The step of W1 and the length of its columns; returns (W1's gradient) . U."""
    width = tl.arange(0, s.block_d)
    keys, step = by_width(k, s), tl.load(number + STEP)
    dot = tl.zeros([s.units], tl.float32)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        by = load_tile(u_from, width, units, s.d, s.n)
        by += load_tile(by_firsts, width, units, s.d, s.n)
        gathered = gathered_by(keys, of_units(parts, D, units, s), g, units, opens, s)
        weight = load_tile(w, width, units, s.d, s.n) - step * gathered
        fit = tl.sum(weight * by, 0)
        by *= by_unit(column + SCALE * s.n, units, s)[None, :]
        by -= weight * (by_unit(column + PULL * s.n, units, s) * fit)[None, :]
        by_norm = fit * by_unit(column + INVERSE * s.n, units, s)
        dot += tl.sum(gathered * by, 0)
        tl.debug_barrier()
        store_tile(u, by, width, units, s.d, s.n)
        tl.store(column + INVERSE * s.n + units, by_norm, mask=units < s.n)
    moved = tl.sum(dot, 0)
    tl.store(number + BY_RATE, -tl.load(number + LENGTH) * moved)
    return moved


@triton.jit
def ungather(
    k, parts, u, g, by_end_total, by_total, number, moved, ends, opens, s: constexpr
):  # fmt: skip
    """The gradients by W1's gradient and by what the tokens added to it.

    Where a chunk does not close, none after it does: its total is that of the end.

    Returns:
        of each token, what the gradient by `alpha` is along the features, and that by `d` along d.
    """
    token, width = tl.arange(0, s.block_l), tl.arange(0, s.block_d)
    keys = by_width(k, s)
    step, bend = tl.load(number + STEP), tl.load(number + BEND) * moved
    aside, turned = tl.zeros([s.block_l], tl.float32), tl.zeros([s.block_l], tl.float32)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        d = of_units(parts, D, units, s)
        by = gathered_by(keys, d, g, units, opens, s) * bend
        by -= load_tile(u, width, units, s.d, s.n) * step
        by += load_tile(by_end_total, width, units, s.d, s.n, ends == 0)
        store_tile(by_total, by, width, units, s.d, s.n)
        by_d = product(keys, by)
        store_tile(parts + BY_D * s.tokens * s.n, by_d, token, units, s.tokens, s.n)
        turned += tl.sum(by_d * d, 1)
        phi_steep = of_units(parts, PHI, units, s) * of_units(parts, STEEP, units, s)
        aside += tl.sum(by_d * phi_steep, 1)
    return aside, turned
