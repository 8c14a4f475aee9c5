"""What a chunk did, made again for the way back: all chunks at once, one program for each.

Everything that the gradient of a scan needs and that depends on no gradient of the outer loss.
Names are those of `kernels/README.md`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constant import constexpr
from .memory_scan_chunk import (
    between,
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

# Of what is kept for each token and hidden unit, [L, n] each. BY_Z is all that a linear memory has.
BY_Z, PHI, STEEP, DELTA, D, CURVE, BY_D, BY_DELTA = map(tl.constexpr, range(8))
# For each pair of tokens, [L, L] each.
SOLVE, FEATURES, ERRORS = map(tl.constexpr, range(3))
# For each hidden unit, [n] each.
SCALE, INVERSE, PULL = map(tl.constexpr, range(3))
# For each chunk.
STEP, LENGTH, BEND, SHRINK, CAPPED, BY_RATE = map(tl.constexpr, range(6))


@triton.jit
def memory_scan_again_kernel(
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
    units,  # [K, N, 8, L, n]
    pairs,  # [K, N, 3, L, L]
    columns,  # [K, N, 3, n]
    numbers,  # [K, N, 6]
    errors,  # [K, N, L, d]
    alongs,  # [K, N, L]
    s: constexpr,
):
    i, net = tl.program_id(0).to(tl.int64), tl.program_id(1)
    nets = tl.num_programs(1)
    at, token = i * nets + net, tl.arange(0, s.block_l)
    here, before = net * s.n * s.d, (at - nets) * s.n * s.d
    w = tl.where(i == 0, first + here, firsts + before)
    f = tl.where(i == 0, last + here, lasts + before)
    keys, rates = k + at * s.tokens * s.d, eta + at * s.tokens
    part, triangle = s.tokens * s.n, s.tokens * s.tokens
    units += at * 8 * part
    pairs += at * 3 * triangle
    numbers += at * 6
    error = errors + at * s.tokens * s.d
    ends = tl.load(closes + at)
    # Until the features are made their place holds gelu of the pre-activations, those of BY_D them.
    a, z, delta = (
        keys if s.linear else units + PHI * part,
        units + BY_D * part,
        units + DELTA * part,
    )
    # To pyright a kernel's function only raises, as it does outside of a kernel.
    rho, gram, solve = predict(  # pyright: ignore[reportGeneralTypeIssues]
        keys, v + at * s.tokens * s.d, rates, w, f, a, z, error, s
    )
    store_tile(pairs + SOLVE * triangle, solve, token, token, s.tokens, s.tokens)
    store_tile(pairs + FEATURES * triangle, gram, token, token, s.tokens, s.tokens)
    tl.debug_barrier()
    store_tile(pairs + ERRORS * triangle, between(error, s), token, token, s.tokens, s.tokens)
    square = zero_vector(s.units)
    for j in range(0, s.block_n, s.units):
        weight = taken_in(a, rho * by_token(rates, s), error, f, j + tl.arange(0, s.units), s)
        square += tl.sum(weight * weight, 1)
    square = tl.sum(square, 0)
    shrink = shrinking(square, ends, s)
    tl.store(numbers + SHRINK, shrink)
    tl.store(numbers + CAPPED, tl.where(shrink < 1, shrink / (square + EPS), 0.0))
    if not s.linear:
        along = differentiate(rates, f, a, delta, error, rho, s)
        tl.store(alongs + at * s.tokens + token, along, mask=token < s.tokens)
        tl.debug_barrier()
        bend_units(units, rho, along, s)
        tl.debug_barrier()
        g = total + here
        square = gathered_square(keys, units, g, i == 0, s)
        length = step_length(square, ends, s)
        step = tl.load(rate + net) * length
        tl.store(numbers + STEP, step)
        tl.store(numbers + LENGTH, length)
        tl.store(numbers + BEND, step * length * length)
        norms = norm + net * s.n
        lengths(keys, units, w, g, i == 0, norms, columns + at * 3 * s.n, step, ends, s)


@triton.jit
def bend_units(parts, rho, along, s: constexpr):
    """Keep what depends on tokens and units."""
    part: constexpr = s.tokens * s.n
    token = tl.arange(0, s.block_l)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        phi, across = through_features(  # pyright: ignore[reportGeneralTypeIssues]
            parts + PHI * part, parts + DELTA * part, rho, along, units, s
        )
        first, second = slopes(load_tile(parts + BY_D * part, token, units, s.tokens, s.n))
        tl.debug_barrier()
        store_tile(parts + PHI * part, phi, token, units, s.tokens, s.n)
        store_tile(parts + STEEP * part, first * rho[:, None], token, units, s.tokens, s.n)
        store_tile(parts + D * part, first * across, token, units, s.tokens, s.n)
        store_tile(parts + CURVE * part, second * across, token, units, s.tokens, s.n)


@triton.jit
def of_units(parts, which: constexpr, units, s: constexpr):
    """Of what is kept for each token and hidden unit, some units; `[block_l, units]`."""
    part = parts + which * s.tokens * s.n
    return load_tile(part, tl.arange(0, s.block_l), units, s.tokens, s.n)


@triton.jit
def gathered_square(k, parts, g, opens, s: constexpr):
    """The square of W1's gradient."""
    square = zero_vector(s.units)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        gathered = gathered_by(k, of_units(parts, D, units, s), g, units, opens, s)
        square += tl.sum(gathered * gathered, 0)
    return tl.sum(square, 0)


@triton.jit
def gathered_by(k, d, g, units, opens, s: constexpr):
    """Some columns of W1's gradient over the chunk and, in the first chunk, what was begun."""
    begun = load_tile(g, tl.arange(0, s.block_d), units, s.d, s.n, opens)
    return product(tl.trans(by_width(k, s)), d, begun)


@triton.jit
def lengths(k, parts, w, g, opens, norm, columns, step, ends, s: constexpr):
    """How the columns of W1 are scaled after the step."""
    width = tl.arange(0, s.block_d)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        d = of_units(parts, D, units, s)
        weight = load_tile(w, width, units, s.d, s.n)
        weight -= step * gathered_by(k, d, g, units, opens, s)
        inverse = tl.rsqrt(tl.sum(weight * weight, 0) + EPS)
        inverse = tl.where(ends, inverse, 0.0)
        scale = by_unit(norm, units, s) * inverse
        inside = units < s.n
        tl.store(columns + INVERSE * s.n + units, inverse, mask=inside)
        tl.store(columns + PULL * s.n + units, scale * inverse * inverse, mask=inside)
        scale = tl.where(ends, scale, 1.0)
        tl.store(columns + SCALE * s.n + units, scale, mask=inside)
