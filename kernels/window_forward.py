"""Attention of a tile of queries to window, sinks and virtual tokens; `README.md` derives it."""

import triton
import triton.language as tl

from .constant import constexpr
from .gates import shares
from .window_places import columns_seen, version, virtual_seen
from .window_scores import exact_scores, virtual_scores
from .window_tiles import (
    close,
    gate_logits,
    load,
    no_softmax,
    products,
    store,
    take_in,
    tokens_of,
)


@triton.jit
def window_forward(
    # views of [B, H, T, D] twice, [B, Hkv, L, D] twice, [B, Hkv, S, D] twice
    q, turned_q, keys, values, sink_keys, sink_values,
    # views of [B, H, T, WIDTH], [B, V M, E]; [H, M], of the gate [1|H], [H, D]; int64 [B]
    absorbed, readouts, slot_bias_ptr, bias_ptr, weight_ptr, start_ptr,
    # views of [B, H, T, D], [B, H, T, E]; float32 [2, B, H, T]
    recent, latent, lse_ptr, tokens, history, versions, alpha, scale, s: constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * s.block_q, tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    start = tl.load(start_ptr + row).to(tl.int32)
    i = first + tl.arange(0, s.block_q)
    there = i < tokens
    lse_ptr += (row * s.heads + head) * tokens + i

    seen = no_softmax(s.block_q, s.block_d)
    seen = over_columns(
        seen, turned_q, keys, values, i, first, row, head, start, tokens, history, scale, False, s
    )
    if s.sinks > 0:
        seen = over_columns(
            seen, q, sink_keys, sink_values, i, first, row, head, start, tokens, history, scale,
            True, s,
        )  # fmt: skip
    lse, mean = close(seen[0], seen[1], seen[2])
    tl.store(lse_ptr, lse, mask=there)
    if s.slots > 0:
        virtual_lse, mix = over_virtual(
            absorbed, readouts, slot_bias_ptr, i, first, row, head, start, tokens, versions, s
        )
        asked = load(tokens_of(q, row, head, i, there), s.d, s.block_d, s)
        logits = gate_logits(asked, bias_ptr, weight_ptr, head, s)
        written = version(start + i + 1, s) > 0
        of_window, of_memory = shares((lse, 1.0), (virtual_lse, 1.0), logits, alpha, written, s)
        mean *= of_window[:, None]
        mix *= of_memory[:, None]
        tl.store(
            lse_ptr + tl.num_programs(2).to(tl.int64) * s.heads * tokens, virtual_lse, mask=there
        )
        store(tokens_of(latent, row, head, i, there), mix, s.e, s.block_e)
    store(tokens_of(recent, row, head, i, there), mean, s.d, s.block_d)


@triton.jit
def over_columns(
    seen, q, keys, values, i, first, row, head, start, tokens, history, scale,
    sinks: constexpr, s: constexpr,
):  # fmt: skip
    """The softmax `seen` after the columns of the window, or the sinks, with their values."""
    queries = tokens_of(q, row, head, i, i < tokens)
    asked = load(queries, s.d, s.block_d, s)
    count = tl.minimum(s.block_q, tokens - first)
    begin, end = columns_seen(first, count, start, history, sinks, s)
    block: constexpr = s.block_s if sinks else s.block_k
    top, mass, total = seen
    for place in range(begin, end, block):
        j = place + tl.arange(0, block)
        columns = tokens_of(keys, row, head // s.repeat, j, j < end)
        tile = load(columns, s.d, s.block_d, s)
        scores = products(asked, tile, queries, columns, s.d, s.block_d, s)
        scores = exact_scores(scores, i[:, None], j[None, :], start, history, scale, sinks, s)
        columns = tokens_of(values, row, head // s.repeat, j, j < end)
        tile = load(columns, s.d, s.block_d, s)
        top, mass, total = take_in(top, mass, total, scores, tile, s)
    return top, mass, total


@triton.jit
def over_virtual(
    absorbed, readouts, slot_bias_ptr, i, first, row, head, start, tokens, versions, s: constexpr
):
    """The log of the mass of a query's virtual tokens, and the mean of their latents."""
    queries = tokens_of(absorbed, row, head, i, i < tokens)
    asked = load(queries, s.e, s.block_e, s)
    top, mass, total = no_softmax(s.block_q, s.block_e)
    count = tl.minimum(s.block_q, tokens - first)
    begin, end = virtual_seen(first, count, start, versions, s)
    for place in range(begin, end, s.block_u):
        u = place + tl.arange(0, s.block_u)
        latents = tokens_of(readouts, row, 0, u, u < end)
        tile = load(latents, s.e, s.block_e, s)
        scores, _, _ = virtual_scores(
            products(asked, tile, queries, latents, s.e, s.block_e, s), absorbed, slot_bias_ptr,
            row, head, i[:, None], u[None, :], start, tokens, versions, s,
        )  # fmt: skip
        top, mass, total = take_in(top, mass, total, scores, tile, s)
    return close(top, mass, total)
