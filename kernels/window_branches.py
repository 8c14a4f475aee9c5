"""Gradients of a tile of queries by each branch: window and sinks, and virtual tokens."""

import triton
import triton.language as tl

from .constant import constexpr
from .window_places import columns_seen, version, virtual_seen
from .window_scores import exact_scores, virtual_scores, weigh
from .window_tiles import at, load_rows, product, products, store_rows


@triton.jit
def by_query(
    q, keys, values, back, lse, share, x, i, first, row, head, start, tokens, history, scale,
    sinks: constexpr, s: constexpr,
):  # fmt: skip
    """The gradient of queries by the columns of the window, or by the sinks, `[queries, D]`.

    Args:
        back: gradient of the output.
        share, x: the gradient of score j is `p_j (share back . v_j - x)`.
    """
    asked = load_rows(at(q, row, head), q[3], i, i < tokens, s.d, s.block_d, s)
    count = tl.minimum(s.block_b, tokens - first)
    begin, end = columns_seen(first, count, start, history, sinks, s)
    block: constexpr = s.block_s if sinks else s.block_k
    first_key, first_value = at(keys, row, head // s.repeat), at(values, row, head // s.repeat)
    found = tl.full([s.block_b, s.block_d], 0.0, tl.float32)
    for place in range(begin, end, block):
        j = place + tl.arange(0, block)
        tile = load_rows(first_key, keys[3], j, j < end, s.d, s.block_d, s)
        scores = exact_scores(
            products(asked, tile, s), i[:, None], j[None, :], start, history, scale, sinks, s
        )
        value = load_rows(first_value, values[3], j, j < end, s.d, s.block_d, s)
        by_score = weigh(scores, lse[:, None]) * (
            share[:, None] * products(back, value, s) - x[:, None]
        )
        found = product(by_score, tile, found, s)
    return found * scale


@triton.jit
def answer_again(
    absorbed, readouts, slot_bias_ptr, dlatent, latent, lse, share, i, first, row, head, start,
    tokens, versions, scale, s: constexpr,
):  # fmt: skip
    """Make the mix of the latents again, store it weighed by `share`, and multiply it by its
    gradient (before it is weighed), `[queries]`."""
    there = i < tokens
    asked = load_rows(at(absorbed, row, head), absorbed[3], i, there, s.e, s.block_e, s)
    count = tl.minimum(s.block_b, tokens - first)
    begin, end = virtual_seen(first, count, start, versions, s)
    mix = tl.full([s.block_b, s.block_e], 0.0, tl.float32)
    for place in range(begin, end, s.block_u):
        u = place + tl.arange(0, s.block_u)
        tile = load_rows(at(readouts, row, 0), readouts[3], u, u < end, s.e, s.block_e, s)
        scores, _, _ = virtual_scores(
            products(asked, tile, s), absorbed, slot_bias_ptr, row, head, i[:, None], u[None, :],
            start, tokens, versions, scale, s,
        )  # fmt: skip
        mix = product(weigh(scores, lse[:, None]), tile, mix, s)
    weighed = mix * share[:, None]
    store_rows(at(latent, row, head), latent[3], i, there, weighed, s.e, s.block_e)
    back = load_rows(at(dlatent, row, head), dlatent[3], i, there, s.e, s.block_e, s)
    return tl.sum(mix * back.to(tl.float32), 1)


@triton.jit
def by_absorbed(
    absorbed, readouts, slot_bias_ptr, dlatent, dabsorbed, lse, share, x, i, first, row, head,
    start, tokens, versions, scale, s: constexpr,
):  # fmt: skip
    """Store the gradient of absorbed queries: of width E, and one for each slot."""
    there = i < tokens
    asked = load_rows(at(absorbed, row, head), absorbed[3], i, there, s.e, s.block_e, s)
    back = load_rows(at(dlatent, row, head), dlatent[3], i, there, s.e, s.block_e, s)
    count = tl.minimum(s.block_b, tokens - first)
    begin, end = virtual_seen(first, count, start, versions, s)
    found = tl.full([s.block_b, s.block_e], 0.0, tl.float32)
    target = at(dabsorbed, row, head)
    by_slot = target + i.to(tl.int64)[:, None] * dabsorbed[3] + s.lead
    for place in range(begin, end, s.block_u):
        u = place + tl.arange(0, s.block_u)
        tile = load_rows(at(readouts, row, 0), readouts[3], u, u < end, s.e, s.block_e, s)
        scores, slot, read = virtual_scores(
            products(asked, tile, s), absorbed, slot_bias_ptr, row, head, i[:, None], u[None, :],
            start, tokens, versions, scale, s,
        )  # fmt: skip
        by_score = weigh(scores, lse[:, None]) * scale
        by_score *= share[:, None] * products(back, tile, s) - x[:, None]
        # A query reads each slot once, and no other query reads it for that query.
        tl.store(by_slot + slot, by_score, mask=read)
        found = product(by_score, tile, found, s)
    e, m = tl.arange(0, s.block_e)[None, :], tl.arange(0, s.block_m)[None, :]
    rows = target + i.to(tl.int64)[:, None] * dabsorbed[3]
    tl.store(rows + e, found, mask=there[:, None] & (e < s.lead))
    # Where nothing was read, and behind the slots, there is no gradient.
    written = version(start + i + 1, s)[:, None] > 0
    unread = there[:, None] & ((m >= s.slots) | ~written)
    tl.store(by_slot + m, 0.0, mask=unread & (m < s.width - s.lead))
