"""Gradients of the training attention by what its queries see: columns, sinks and latents.

A program makes the gradients of one tile of columns and goes through the queries that may see it,
so that nothing is added by two programs at once and a gradient is the same in every run. Tiles of
scores stand the other way round than in the other kernels, `[columns, queries]`.
"""

import triton
import triton.language as tl

from .constant import constexpr
from .window_places import columns_seen, queries_reading, queries_seeing
from .window_scores import exact_scores, virtual_scores, weigh
from .window_tiles import load, product, products, store, tokens_of


@triton.jit
def window_columns(
    # views of [B, H, T, D], [B, Hkv, L|S, D] twice, the output's gradient [B, H, T, D]
    q, keys, values, dy, start_ptr, lse_ptr, kept_ptr,
    # views of [PARTS, B, Hkv, L|S, D]
    dkeys, dvalues, dkeys_part, dvalues_part,
    tokens, history, columns, span, scale, sinks: constexpr, s: constexpr,
):  # fmt: skip
    """By keys and values, of the window or of the sinks.

    Args:
        span: queries that a part goes through; of the window's there is but one part.
    """
    block: constexpr = s.block_s if sinks else s.block_c
    blocks = tl.cdiv(columns, block)
    part, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * block
    kv_head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    start = tl.load(start_ptr + row).to(tl.int32)
    j = first + tl.arange(0, block)
    begin, end = part * span, tl.minimum(part * span + span, tokens)
    if not sinks:
        count = tl.minimum(block, columns - first)
        begin, end = queries_seeing(first, count, start, history, tokens, s)
    # What no query sees may hold anything.
    seen_from, seen_to = columns_seen(0, tokens, start, history, sinks, s)
    there = (j >= seen_from) & (j < seen_to)
    key, value = tokens_of(keys, row, kv_head, j, there), tokens_of(values, row, kv_head, j, there)
    k, v = load(key, s.d, s.block_d, s), load(value, s.d, s.block_d, s)
    dk = tl.full([block, s.block_d], 0.0, tl.float32)
    dv = tl.full([block, s.block_d], 0.0, tl.float32)
    for head in range(kv_head * s.repeat, kv_head * s.repeat + s.repeat):
        of_head = (row * s.heads + head) * tokens
        branch = tl.num_programs(2).to(tl.int64) * s.heads * tokens
        for place in range(begin, end, s.block_q):
            i = place + tl.arange(0, s.block_q)
            queries = tokens_of(q, row, head, i, i < end)
            given = tokens_of(dy, row, head, i, i < end)
            asked, back = load(queries, s.d, s.block_d, s), load(given, s.d, s.block_d, s)
            lse = tl.load(lse_ptr + of_head + i, mask=i < end, other=0)[None, :]
            share = tl.load(kept_ptr + of_head + i, mask=i < end, other=0)[None, :]
            x = tl.load(kept_ptr + branch + of_head + i, mask=i < end, other=0)[None, :]
            scores = products(k, asked, key, queries, s.d, s.block_d, s)
            scores = exact_scores(scores, i[None, :], j[:, None], start, history, scale, sinks, s)
            weights = weigh(scores, lse)
            dv = product(weights * share, back, dv, s)
            by_value = products(v, back, value, given, s.d, s.block_d, s)
            by_score = weights * (share * by_value - x)
            dk = product(by_score, asked, dk, s)
    first_key, stride, _, _ = tokens_of(dkeys, row, kv_head, j, there)
    store((first_key + part * dkeys_part, stride, j, j < columns), dk * scale, s.d, s.block_d)
    first_value, stride, _, _ = tokens_of(dvalues, row, kv_head, j, there)
    store((first_value + part * dvalues_part, stride, j, j < columns), dv, s.d, s.block_d)


@triton.jit
def window_latents(
    # views of [B, H, T, WIDTH], [B, V M, E], the gradient of what they bring, [B, H, T, E]
    absorbed, readouts, dlatent, slot_bias_ptr, start_ptr, lse_ptr, kept_ptr,
    # view of float32 [PARTS, B, V M, E]
    dreadouts, dreadouts_part, tokens, versions, span, s: constexpr,
):  # fmt: skip
    """By latents, which are keys and values at once.

    Args:
        span: query heads that a part goes through.
    """
    first, part = tl.program_id(0) * s.block_u, tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    start, columns = tl.load(start_ptr + row).to(tl.int32), versions * s.slots
    u = first + tl.arange(0, s.block_u)
    count = tl.minimum(s.block_u, columns - first)
    asking = queries_reading(first, count, start, versions, tokens, s)
    begin, end = asking[0], asking[1]
    latents = tokens_of(readouts, row, 0, u, u < columns)
    tile = load(latents, s.e, s.block_e, s)
    found = tl.full([s.block_u, s.block_e], 0.0, tl.float32)
    branch = tl.num_programs(2).to(tl.int64) * s.heads * tokens
    for head in range(part * span, tl.minimum(part * span + span, s.heads)):
        of_head = (row * s.heads + head) * tokens
        for place in range(begin, end, s.block_q):
            i = place + tl.arange(0, s.block_q)
            queries = tokens_of(absorbed, row, head, i, i < end)
            given = tokens_of(dlatent, row, head, i, i < end)
            asked, back = load(queries, s.e, s.block_e, s), load(given, s.e, s.block_e, s)
            lse = tl.load(lse_ptr + branch + of_head + i, mask=i < end, other=0)[None, :]
            share = tl.load(kept_ptr + 2 * branch + of_head + i, mask=i < end, other=0)[None, :]
            x = tl.load(kept_ptr + 3 * branch + of_head + i, mask=i < end, other=0)[None, :]
            scores, _, _ = virtual_scores(
                products(tile, asked, latents, queries, s.e, s.block_e, s), absorbed,
                slot_bias_ptr, row, head, i[None, :], u[:, None], start, end, versions, s,
            )  # fmt: skip
            weights = weigh(scores, lse)
            found = product(weights * share, back, found, s)
            by_value = products(tile, back, latents, given, s.e, s.block_e, s)
            by_score = weights * (share * by_value - x)
            found = product(by_score, asked, found, s)
    begin, stride, _, _ = tokens_of(dreadouts, row, 0, u, u < columns)
    store((begin + part * dreadouts_part, stride, u, u < columns), found, s.e, s.block_e)
