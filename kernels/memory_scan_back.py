"""The way back through a scan: one program for each network, chunk before chunk.

Only what the recurrence of the gradients by W1 and F needs is here; what it needs of the chunks
themselves is made before (`memory_scan_again.py`), what only tokens need of it after
(`memory_scan_tokens.py`). A pass ends where the next one needs a sum over all hidden units.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .constant import constexpr
from .memory_scan_again import BY_DELTA, CAPPED, ERRORS, PHI, SHRINK, SOLVE
from .memory_scan_tiles import by_pair, by_token, by_width, lower, overlaps, product, zero_vector
from .memory_scan_unclose import add, uncap, ungather, unstep
from .memory_scan_unlearn import pull, unalign, uncouple, unfeature, ungradient, unlearn, unpredict
from .memory_tiles import store_tile


@triton.jit
def memory_scan_back_kernel(
    k,  # [K, N, L, d]
    eta,  # [K, N, L]
    first,  # [N, d, n]
    last,  # [N, n, d]
    total,  # [N, d, n]
    closes,  # [K, N]
    firsts,  # [K, N, d, n]
    lasts,  # [K, N, n, d]
    units,  # [K, N, 8, L, n]
    pairs,  # [K, N, 3, L, L]
    columns,  # [K, N, 3, n]
    numbers,  # [K, N, 6]
    errors,  # [K, N, L, d]
    alongs,  # [K, N, L]
    by_firsts,  # [K, N, d, n]
    by_lasts,  # [K, N, n, d]
    by_end_first,  # [N, d, n]
    by_end_last,  # [N, n, d]
    by_end_total,  # [N, d, n]
    by_first,  # [N, d, n]
    by_last,  # [N, n, d]
    by_totals,  # [K, N, d, n]
    by_v,  # [K, N, L, d]
    pulled_to,  # [K, N, L, d]
    chunks,
    s: constexpr,
):
    net, nets = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    token, width = tl.arange(0, s.block_l), tl.arange(0, s.block_d)
    size, part, triangle = s.n * s.d, s.tokens * s.n, s.tokens * s.tokens
    here = net * size
    u, q = by_first + here, by_last + here
    for back in range(chunks):
        i = chunks - 1 - back
        at = i * nets + net
        to, rows = at * size, at * s.tokens * s.d
        w = tl.where(i == 0, first + here, firsts + to - nets * size)
        f = tl.where(i == 0, last + here, lasts + to - nets * size)
        keys, number, pair = k + rows, numbers + at * 6, pairs + at * 3 * triangle
        parts = units + at * part if s.linear else units + at * 8 * part
        phi = keys if s.linear else parts + PHI * part
        error, rates, by_residual = errors + rows, eta + at * s.tokens, by_v + rows

        q_from = tl.where(back == 0, by_end_last + here, q)
        add(q_from, by_lasts + to, q, s)
        if not s.linear:
            u_from = tl.where(back == 0, by_end_first + here, u)
            column, g = columns + at * 3 * s.n, total + here
            moved = unstep(keys, parts, w, g, u_from, by_firsts + to, u, column, number, i == 0, s)
        tl.debug_barrier()
        shrink = tl.load(number + SHRINK)
        if shrink < 1:
            uncap(phi, error, rates, f, q, shrink, tl.load(number + CAPPED), s)
        if not s.linear:
            by_g, by_end = by_totals + to, by_end_total + here
            ungather(
                keys, parts, u, g, by_end, by_g, number, moved, tl.load(closes + at), i == 0, s
            )
        tl.debug_barrier()
        pulled = pull(phi, q, s)
        store_tile(pulled_to + rows, pulled, token, width, s.tokens, s.d)
        by_error = pulled * by_token(rates, s)[:, None]
        aside, turned = zero_vector(s.block_l), zero_vector(s.block_l)
        if not s.linear:
            aside, turned = ungradient(keys, parts, by_g, s)
            tl.debug_barrier()
            unalign(parts, aside, s)
            tl.debug_barrier()
            by_delta = parts + BY_DELTA * part
            mixed = both_ways(overlaps(by_delta, phi, s.n, s.block_n, s), rates, s)
            by_error -= pull(by_delta, f, s) + product(mixed, by_width(error, s))
        by_error = product(tl.trans(by_pair(pair + SOLVE * triangle, s)), by_error)
        store_tile(by_residual, by_error, token, width, s.tokens, s.d)
        tl.debug_barrier()
        unpredict(parts, rates, f, q, by_residual, error, s)
        tl.debug_barrier()
        mixed = both_ways(overlaps(by_residual, error, s.d, s.block_d, s), rates, s)
        coupling = tl.trans(by_pair(pair + ERRORS * triangle, s) * by_token(rates, s)[None, :])
        across = uncouple(phi, parts, mixed, coupling, alongs + at * s.tokens, aside, s)
        tl.debug_barrier()
        unlearn(phi, parts, q, by_residual, error, s)
        if not s.linear:
            unfeature(keys, parts, u, turned, across, s)
        tl.debug_barrier()


@triton.jit
def both_ways(mixed, eta, s: constexpr):
    """What a product of two tokens' rows, the later's with the rate of the earlier, is to both."""
    coupled = lower(mixed, s) * by_token(eta, s)[None, :]
    return coupled + tl.trans(coupled)
