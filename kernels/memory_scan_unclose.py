"""The end of a chunk backwards: from the gradients by the weights after it to those before.

`_unclose` of `ttt_cache/memory/adjoint.py`, in which U and Q are the gradients by W1 and F.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constant import constexpr
from .memory_scan_again import (
    BEND,
    BY_RATE,
    INVERSE,
    LENGTH,
    PULL,
    SCALE,
    STEP,
    D,
    gathered_by,
    of_units,
)
from .memory_scan_chunk import taken_in
from .memory_scan_tiles import by_token, by_unit, zero_vector
from .memory_tiles import load_tile, store_tile


@triton.jit
def add(q_from, by_lasts, q, s: constexpr):
    """Add the gradient by this version to Q."""
    width = tl.arange(0, s.block_d)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        by = load_tile(q_from, units, width, s.n, s.d) + load_tile(by_lasts, units, width, s.n, s.d)
        tl.debug_barrier()
        store_tile(q, by, units, width, s.n, s.d)


@triton.jit
def uncap(phi, error, eta, f, q, shrink, capped, s: constexpr):
    """Q before F was brought back to its cap.

    Args:
        shrink, capped: what F was multiplied by, and minus its derivative by |F|^2 / 2.
    """
    width = tl.arange(0, s.block_d)
    dot = zero_vector(s.units)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        full = taken_in(phi, by_token(eta, s), error, f, units, s)
        dot += tl.sum(full * load_tile(q, units, width, s.n, s.d), 1)
    capped *= tl.sum(dot, 0)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        full = taken_in(phi, by_token(eta, s), error, f, units, s)
        by = load_tile(q, units, width, s.n, s.d) * shrink - full * capped
        tl.debug_barrier()
        store_tile(q, by, units, width, s.n, s.d)


@triton.jit
def unstep(k, parts, w, g, u_from, by_firsts, u, column, number, opens, s: constexpr):
    """The step of W1 and the length of its columns; returns (W1's gradient) . U."""
    width = tl.arange(0, s.block_d)
    step = tl.load(number + STEP)
    dot = zero_vector(s.units)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        gathered = gathered_by(k, of_units(parts, D, units, s), g, units, opens, s)
        weight = load_tile(w, width, units, s.d, s.n) - step * gathered
        tl.debug_barrier()  # loads ahead of the product would not fit in registers beside it
        by = load_tile(u_from, width, units, s.d, s.n)
        by += load_tile(by_firsts, width, units, s.d, s.n)
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
def ungather(k, parts, u, g, by_end_total, by_total, number, moved, ends, opens, s: constexpr):
    """The gradient by W1's gradient.

    Where a chunk does not close, none after it does: its total is that of the end.
    """
    width = tl.arange(0, s.block_d)
    step, bend = tl.load(number + STEP), tl.load(number + BEND) * moved
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        by = gathered_by(k, of_units(parts, D, units, s), g, units, opens, s) * bend
        by -= load_tile(u, width, units, s.d, s.n) * step
        by += load_tile(by_end_total, width, units, s.d, s.n, ends == 0)
        store_tile(by_total, by, width, units, s.d, s.n)
