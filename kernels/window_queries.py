"""Gradients of the training attention by its queries, and what the others need of each query."""

import triton
import triton.language as tl

from .constant import constexpr
from .gates import shares
from .tile import load_vector
from .window_branches import answer_again, by_absorbed, by_query
from .window_places import version
from .window_tiles import gate_logits, load, store, tokens_of


@triton.jit
def window_queries(
    # views of [B, H, T, D] twice, [B, Hkv, L, D] twice, [B, Hkv, S, D] twice
    q, turned_q, keys, values, sink_keys, sink_values,
    # views of [B, H, T, WIDTH], [B, V M, E]; [H, M], of the gate [1|H], [H, D]; int64 [B]
    absorbed, readouts, slot_bias_ptr, bias_ptr, weight_ptr, start_ptr,
    # views of what the window gave of the output, [B, H, T, D], of the output's gradient, and of
    # that by the mix of latents, [B, H, T, E]
    recent, dy, dlatent, lse_ptr,
    # views of [B, H, T, D] twice, [B, H, T, WIDTH], [B, H, T, E]; float32 [B, H, T], [4, B, H, T]
    dq, dturned, dabsorbed, latent, dlogit_ptr, kept_ptr,
    tokens, history, versions, alpha, scale, s: constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * s.block_q, tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    start = tl.load(start_ptr + row).to(tl.int32)
    i = first + tl.arange(0, s.block_q)
    there = i < tokens
    per_query = (row * s.heads + head) * tokens + i
    branch = tl.num_programs(2).to(tl.int64) * s.heads * tokens

    back = load(tokens_of(dy, row, head, i, there), s.d, s.block_d, s)
    given = load(tokens_of(recent, row, head, i, there), s.d, s.block_d, s)
    x = tl.sum(back.to(tl.float32) * given.to(tl.float32), 1)
    lse = tl.load(lse_ptr + per_query, mask=there, other=0)
    share = tl.full([s.block_q], 1.0, tl.float32)
    if s.slots > 0:
        virtual_lse = tl.load(lse_ptr + branch + per_query, mask=there, other=0)
        asked = load(tokens_of(q, row, head, i, there), s.d, s.block_d, s)
        logits = gate_logits(asked, bias_ptr, weight_ptr, head, s)
        written = version(start + i + 1, s) > 0
        share, of_memory = shares((lse, 1.0), (virtual_lse, 1.0), logits, alpha, written, s)
        answer = answer_again(
            absorbed, readouts, slot_bias_ptr, dlatent, latent, virtual_lse, of_memory,
            i, first, row, head, start, tokens, versions, s,
        )  # fmt: skip
        x, virtual_x, dlogit = by_gate(x, answer, share, of_memory, s)
        tl.store(kept_ptr + 2 * branch + per_query, of_memory, mask=there)
        tl.store(kept_ptr + 3 * branch + per_query, virtual_x, mask=there)
        if s.gate != "fixed":
            tl.store(dlogit_ptr + per_query, dlogit, mask=there)
        by_absorbed(
            absorbed, readouts, slot_bias_ptr, dlatent, dabsorbed, virtual_lse, of_memory,
            virtual_x, i, first, row, head, start, tokens, versions, s,
        )  # fmt: skip
    tl.store(kept_ptr + per_query, share, mask=there)
    tl.store(kept_ptr + branch + per_query, x, mask=there)
    found = by_query(
        turned_q, keys, values, dy, lse, share, x, i, first, row, head, start, tokens, history,
        scale, False, s,
    )  # fmt: skip
    store(tokens_of(dturned, row, head, i, there), found, s.d, s.block_d)
    if (s.sinks > 0) | (s.gate == "query"):
        found = tl.full([s.block_q, s.block_d], 0.0, tl.float32)
        if s.sinks > 0:
            found = by_query(
                q, sink_keys, sink_values, dy, lse, share, x, i, first, row, head, start, tokens,
                history, scale, True, s,
            )  # fmt: skip
        if s.gate == "query":
            weight = load_vector(weight_ptr + head * s.d, s.d, s.block_d)
            found += dlogit[:, None] * weight[None, :]
        store(tokens_of(dq, row, head, i, there), found, s.d, s.block_d)


@triton.jit
def by_gate(x, answer, share, of_memory, s: constexpr):
    """What is taken from the gradients of both branches' scores, and the gradient of the logit.

    Args:
        x: what the window gave of the output, times the output's gradient.
        answer: the memory's answer, before it is weighed, times the same; 0 where not written.
        share, of_memory: what window and memory are weighed with.
    """
    virtual_x = of_memory * answer
    dlogit = of_memory * x - share * virtual_x  # through a sigmoid
    if s.gate == "joint":
        both = x + virtual_x
        dlogit = virtual_x - of_memory * both
        x, virtual_x = share * both, of_memory * both
    elif s.gate == "residual":
        dlogit = answer * (1 - of_memory * of_memory)
    return x, virtual_x, dlogit
