"""What only tokens need of a scan's gradient: keys and rates, all chunks at once."""

from __future__ import annotations

import triton
import triton.language as tl

from .constant import constexpr
from .memory_scan_again import BY_DELTA, BY_Z, ERRORS, FEATURES, PHI, D, of_units
from .memory_scan_tiles import by_pair, by_width, overlaps, product, zero_matrix
from .memory_tiles import load_tile, store_tile


@triton.jit
def memory_scan_tokens_kernel(
    first,  # [N, d, n]
    firsts,  # [K, N, d, n]
    units,  # [K, N, 8, L, n]
    pairs,  # [K, N, 3, L, L]
    errors,  # [K, N, L, d]
    by_totals,  # [K, N, d, n]
    by_v,  # [K, N, L, d]
    pulled,  # [K, N, L, d]
    by_k,  # [K, N, L, d]
    by_eta,  # [K, N, L]
    s: constexpr,
):
    i, net = tl.program_id(0).to(tl.int64), tl.program_id(1)
    nets = tl.num_programs(1)
    at, token = i * nets + net, tl.arange(0, s.block_l)
    rows, pair = at * s.tokens * s.d, pairs + at * 3 * s.tokens * s.tokens
    parts, triangle = units + at * 8 * s.tokens * s.n, s.tokens * s.tokens
    by_rates = tl.sum(by_width(errors + rows, s) * by_width(pulled + rows, s), 1)
    mixed = overlaps(by_v + rows, errors + rows, s.d, s.block_d, s)
    coupled = mixed * by_pair(pair + FEATURES * triangle, s)
    if not s.linear:
        size = s.n * s.d
        w = tl.where(i == 0, first + net * size, firsts + (at - nets) * size)
        of_keys(parts, w, by_totals + at * size, by_k + rows, s)
        by_delta, phi = parts + BY_DELTA * s.tokens * s.n, parts + PHI * s.tokens * s.n
        mixed = overlaps(by_delta, phi, s.n, s.block_n, s)
        coupled += mixed * by_pair(pair + ERRORS * triangle, s)
    by_rates -= tl.sum(coupled, 0)
    tl.store(by_eta + at * s.tokens + token, by_rates, mask=token < s.tokens)


@triton.jit
def of_keys(parts, w, by_total, by_k, s: constexpr):
    """The gradient by the keys."""
    token = tl.arange(0, s.block_l)
    for c in range(0, s.block_d, s.depth):
        width = c + tl.arange(0, s.depth)
        found = zero_matrix(s.block_l, s.depth)
        for j in range(0, s.block_n, s.units):
            units = j + tl.arange(0, s.units)
            by_z, d = of_units(parts, BY_Z, units, s), of_units(parts, D, units, s)
            found = product(by_z, tl.trans(load_tile(w, width, units, s.d, s.n)), found)
            found = product(d, tl.trans(load_tile(by_total, width, units, s.d, s.n)), found)
        store_tile(by_k, found, token, width, s.tokens, s.d)
