"""The kernel of `memory_scan`: one program for each network, chunk after chunk.

A version is read where the chunk before stored it: it is in the caches, and no size of network has
to fit in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constant import constexpr
from .memory_scan_chunk import (
    differentiate,
    predict,
    shrinking,
    slopes,
    step_length,
    taken_in,
    through_features,
)
from .memory_scan_tiles import by_token, by_unit, by_width, product, zero_vector
from .memory_tiles import EPS, load_tile, store_tile


@triton.jit
def memory_scan_kernel(
    k,  # [K, N, L, d]
    v,  # [K, N, L, d]
    eta,  # [K, N, L]
    first,  # [N, d, n]
    last,  # [N, n, d]
    total,  # [N, d, n]
    rate,  # [N]
    norm,  # [N, n]
    closes,  # [K, N]
    firsts,  # [K, N, d, n]
    lasts,  # [K, N, n, d]
    end_total,  # [N, d, n]
    scratch,  # [N, L, 3 n + d]
    chunks,
    s: constexpr,
):
    net, nets = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    here, part = net * s.n * s.d, s.tokens * s.n
    made = scratch + net * s.tokens * (3 * s.n + s.d)
    z, d_phi, error = made + part, made + 2 * part, made + 3 * part
    for i in range(chunks):
        at = i * nets + net
        keys, rates, to = k + at * s.tokens * s.d, eta + at * s.tokens, at * s.n * s.d
        w = tl.where(i == 0, first + here, firsts + to - nets * s.n * s.d)
        f = tl.where(i == 0, last + here, lasts + to - nets * s.n * s.d)
        a = keys if s.linear else made
        ends = tl.load(closes + at)
        # To pyright a kernel's function only raises, as it does outside of a kernel.
        rho, _, _ = predict(  # pyright: ignore[reportGeneralTypeIssues]
            keys, v + at * s.tokens * s.d, rates, w, f, a, z, error, s
        )
        tl.debug_barrier()
        square = learn(rates, f, lasts + to, a, error, rho, s)
        along = rho
        if not s.linear:
            along = differentiate(rates, f, a, d_phi, error, rho, s)
        tl.debug_barrier()
        shrink = shrinking(square, ends, s)
        if shrink < 1:
            shorten(lasts + to, shrink, s)
        if not s.linear:
            goes_on = tl.load(closes + at - nets, mask=i > 0, other=0) == 0
            g = tl.where(i == 0, total + here, end_total + here)
            square = gather(keys, a, z, d_phi, rho, along, g, goes_on, end_total + here, s)
            tl.debug_barrier()
            step = tl.load(rate + net) * step_length(square, ends, s)
            clears = ends & (i + 1 == chunks)
            advance(w, norm + net * s.n, end_total + here, firsts + to, step, ends, clears, s)
        tl.debug_barrier()


@triton.jit
def learn(eta, f, f_to, a, error, rho, s: constexpr):
    """The delta rule on F; returns its square."""
    width = tl.arange(0, s.block_d)
    square = zero_vector(s.units)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        weight = taken_in(a, rho * by_token(eta, s), error, f, units, s)
        square += tl.sum(weight * weight, 1)
        store_tile(f_to, weight, units, width, s.n, s.d)
    return tl.sum(square, 0)


@triton.jit
def shorten(f, shrink, s: constexpr):
    """Bring F back to its cap."""
    width = tl.arange(0, s.block_d)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        weight = load_tile(f, units, width, s.n, s.d)
        tl.debug_barrier()
        store_tile(f, weight * shrink, units, width, s.n, s.d)


@triton.jit
def gather(k, a, z, d_phi, rho, along, g, goes_on, g_to, s: constexpr):
    """W1's gradient so far, with the chunk's; returns its square."""
    width = tl.arange(0, s.block_d)
    square = zero_vector(s.units)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        _, across = through_features(a, d_phi, rho, along, units, s)
        d = across * slopes(load_tile(z, tl.arange(0, s.block_l), units, s.tokens, s.n))[0]
        gathered = product(
            tl.trans(by_width(k, s)), d, load_tile(g, width, units, s.d, s.n, goes_on)
        )
        square += tl.sum(gathered * gathered, 0)
        tl.debug_barrier()
        store_tile(g_to, gathered, width, units, s.d, s.n)
    return tl.sum(square, 0)


@triton.jit
def advance(w, norm, g, w_to, step, ends, clears, s: constexpr):
    """A step of W1, whose columns get their old length; or W1 as it was, if the step is 0."""
    width = tl.arange(0, s.block_d)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        weight = load_tile(w, width, units, s.d, s.n)
        weight -= step * load_tile(g, width, units, s.d, s.n)
        scale = by_unit(norm, units, s) * tl.rsqrt(tl.sum(weight * weight, 0) + EPS)
        scale = tl.where(ends, scale, 1.0)
        tl.debug_barrier()  # a zero waits for no value: all have loaded what it replaces
        store_tile(w_to, weight * scale[None, :], width, units, s.d, s.n)
        store_tile(g, tl.zeros_like(weight), width, units, s.d, s.n, clears)
