"""Gradients of a tile of queries by each branch: window and sinks, and virtual tokens."""

import triton
import triton.language as tl

from .constant import constexpr
from .window_places import columns_seen, version, virtual_seen
from .window_scores import exact_scores, virtual_scores, weigh
from .window_tiles import load, product, products, store, tokens_of


@triton.jit
def by_query(
    q, keys, values, dy, lse, share, x, i, first, row, head, start, tokens, history, scale,
    sinks: constexpr, s: constexpr,
):  # fmt: skip
    """The gradient of queries by the columns of the window, or by the sinks, `[queries, D]`.

    Args:
        share, x: the gradient of score j is `p_j (share dy . v_j - x)`.
    """
    queries, given = tokens_of(q, row, head, i, i < tokens), tokens_of(dy, row, head, i, i < tokens)
    asked, back = load(queries, s.d, s.block_d, s), load(given, s.d, s.block_d, s)
    count = tl.minimum(s.block_q, tokens - first)
    begin, end = columns_seen(first, count, start, history, sinks, s)
    block: constexpr = s.block_s if sinks else s.block_k
    found = tl.full([s.block_q, s.block_d], 0.0, tl.float32)
    for place in range(begin, end, block):
        j = place + tl.arange(0, block)
        columns = tokens_of(keys, row, head // s.repeat, j, j < end)
        tile = load(columns, s.d, s.block_d, s)
        scores = products(asked, tile, queries, columns, s.d, s.block_d, s)
        scores = exact_scores(scores, i[:, None], j[None, :], start, history, scale, sinks, s)
        columns = tokens_of(values, row, head // s.repeat, j, j < end)
        value = load(columns, s.d, s.block_d, s)
        by_value = products(back, value, given, columns, s.d, s.block_d, s)
        by_score = weigh(scores, lse[:, None]) * (share[:, None] * by_value - x[:, None])
        found = product(by_score, tile, found, s)
    return found * scale


@triton.jit
def answer_again(
    absorbed, readouts, slot_bias_ptr, dlatent, latent, lse, share, i, first, row, head, start,
    tokens, versions, s: constexpr,
):  # fmt: skip
    """Make the mix of the latents again, store it weighed by `share`, and return it, before that,
    times its gradient, `[queries]`.

    A sum of the products that `by_absorbed` subtracts it from: they cancel to the last bit.
    """
    there = i < tokens
    queries = tokens_of(absorbed, row, head, i, there)
    given = tokens_of(dlatent, row, head, i, there)
    asked, back = load(queries, s.e, s.block_e, s), load(given, s.e, s.block_e, s)
    count = tl.minimum(s.block_q, tokens - first)
    begin, end = virtual_seen(first, count, start, versions, s)
    answer = tl.full([s.block_q], 0.0, tl.float32)
    mix = tl.full([s.block_q, s.block_e], 0.0, tl.float32)
    for place in range(begin, end, s.block_u):
        u = place + tl.arange(0, s.block_u)
        latents = tokens_of(readouts, row, 0, u, u < end)
        tile = load(latents, s.e, s.block_e, s)
        scores, _, _ = virtual_scores(
            products(asked, tile, queries, latents, s.e, s.block_e, s), absorbed, slot_bias_ptr,
            row, head, i[:, None], u[None, :], start, tokens, versions, s,
        )  # fmt: skip
        weights = weigh(scores, lse[:, None])
        by_value = products(back, tile, given, latents, s.e, s.block_e, s)
        answer += tl.sum(weights * by_value, 1)
        mix = product(weights, tile, mix, s)
    store(tokens_of(latent, row, head, i, there), mix * share[:, None], s.e, s.block_e)
    return answer


@triton.jit
def by_absorbed(
    absorbed, readouts, slot_bias_ptr, dlatent, dabsorbed, lse, share, x, i, first, row, head,
    start, tokens, versions, s: constexpr,
):  # fmt: skip
    """Store the gradient of absorbed queries: of width E, and one for each slot."""
    there = i < tokens
    queries = tokens_of(absorbed, row, head, i, there)
    given = tokens_of(dlatent, row, head, i, there)
    asked, back = load(queries, s.e, s.block_e, s), load(given, s.e, s.block_e, s)
    count = tl.minimum(s.block_q, tokens - first)
    begin, end = virtual_seen(first, count, start, versions, s)
    found = tl.full([s.block_q, s.block_e], 0.0, tl.float32)
    target = tokens_of(dabsorbed, row, head, i, there)
    by_slot = target[0] + i.to(tl.int64)[:, None] * target[1] + s.lead
    for place in range(begin, end, s.block_u):
        u = place + tl.arange(0, s.block_u)
        latents = tokens_of(readouts, row, 0, u, u < end)
        tile = load(latents, s.e, s.block_e, s)
        scores, slot, read = virtual_scores(
            products(asked, tile, queries, latents, s.e, s.block_e, s), absorbed, slot_bias_ptr,
            row, head, i[:, None], u[None, :], start, tokens, versions, s,
        )  # fmt: skip
        by_score = weigh(scores, lse[:, None])
        by_value = products(back, tile, given, latents, s.e, s.block_e, s)
        by_score *= share[:, None] * by_value - x[:, None]
        # A query reads each slot once, and no other query reads it for that query.
        tl.store(by_slot + slot, by_score, mask=read)
        found = product(by_score, tile, found, s)
    store(target, found, s.lead, s.block_e)
    # Where nothing was read, and behind the slots, there is no gradient.
    m = tl.arange(0, s.block_m)[None, :]
    unread = (m >= s.slots) | (version(start + i + 1, s)[:, None] == 0)
    tl.store(by_slot + m, 0.0, mask=unread & there[:, None] & (m < s.width - s.lead))
