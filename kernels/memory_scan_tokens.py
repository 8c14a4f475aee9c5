"""What only tokens need of a scan's gradient: keys and rates, all chunks at once."""

from __future__ import annotations

import triton
import triton.language as tl

from .constant import constexpr
from .memory_scan_again import BY_DELTA, BY_Z, ERRORS, FEATURES, PHI, D
from .memory_scan_tiles import by_pair, by_width, product
from .memory_scan_unlearn import of_units
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
    at, token, width = i * nets + net, tl.arange(0, s.block_l), tl.arange(0, s.block_d)
    rows, pair = at * s.tokens * s.d, pairs + at * 3 * s.tokens * s.tokens
    error = by_width(errors + rows, s)
    by_rates = tl.sum(error * by_width(pulled + rows, s), 1)
    mixed = product(by_width(by_v + rows, s), tl.trans(error))
    coupled = mixed * by_pair(pair + FEATURES * s.tokens * s.tokens, s)
    if not s.linear:
        size = s.n * s.d
        w = tl.where(i == 0, first + net * size, firsts + (at - nets) * size)
        found, mixed = of_keys(w, units + at * 8 * s.tokens * s.n, by_totals + at * size, s)
        store_tile(by_k + rows, found, token, width, s.tokens, s.d)
        coupled += mixed * by_pair(pair + ERRORS * s.tokens * s.tokens, s)
    by_rates -= tl.sum(coupled, 0)
    tl.store(by_eta + at * s.tokens + token, by_rates, mask=token < s.tokens)


@triton.jit
def of_keys(w, parts, by_total, s: constexpr):
    """The gradient by the keys, and the gradient by `delta` times the features."""
    width = tl.arange(0, s.block_d)
    found = tl.zeros([s.block_l, s.block_d], tl.float32)
    mixed = tl.zeros([s.block_l, s.block_l], tl.float32)
    for j in range(0, s.block_n, s.units):
        units = j + tl.arange(0, s.units)
        by_z, d = of_units(parts, BY_Z, units, s), of_units(parts, D, units, s)
        found = product(by_z, tl.trans(load_tile(w, width, units, s.d, s.n)), found)
        found = product(d, tl.trans(load_tile(by_total, width, units, s.d, s.n)), found)
        by_delta, phi = of_units(parts, BY_DELTA, units, s), of_units(parts, PHI, units, s)
        mixed = product(by_delta, tl.trans(phi), mixed)
    return found, mixed
