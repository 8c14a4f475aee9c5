"""One streaming step of a layer's attention, from q, k and v to what its heads bring back.

A program answers one query head of one row over one part of what it sees: a span of the ring, or
sinks and virtual tokens, or all of it where there are heads enough to fill the GPU. `README.md` has
the derivation.
"""

import triton
import triton.language as tl

from .attend import over_sinks, over_virtual, over_window
from .constant import constexpr
from .gates import gate_logit, shares
from .handover import arrive, load_softmax, store_softmax
from .tile import fold, store_vector


@triton.jit
def decode_kernel(
    # [B, H, D], [B, Hkv, D] twice, before RoPE; int64 [B] before this step, bool [B]; [D / 2]
    q_ptr, k_ptr, v_ptr, executed_ptr, mask_ptr, frequencies_ptr,
    # [B, Hkv, W, D] and [B, Hkv, S, D]
    keys_ptr, values_ptr, sink_keys_ptr, sink_values_ptr,
    # [B, H, E + M] scaled, float32 [B, M, E]; of the gate [1|H], [H, D]
    absorbed_ptr, readout_ptr, bias_ptr, weight_ptr,
    # [B, H, D], [B, H, E]; int32 [B], [B, H]; float32 [B, H, PARTS, *], of virtual tokens [B, H, *]
    recent_ptr, latent_ptr, rows_ptr, heads_ptr, sums_ptr, totals_ptr, virtual_ptr, mixes_ptr,
    q_row, k_row, v_row, absorbed_row, absorbed_head, alpha, scale, s: constexpr,
):  # fmt: skip
    head, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    query, ring = row * s.heads + head, row * (s.heads // s.repeat) + head // s.repeat
    q_ptr += row * q_row + head * s.d
    k_ptr += row * k_row + head // s.repeat * s.d
    v_ptr += row * v_row + head // s.repeat * s.d
    before, kept = tl.load(executed_ptr + row), tl.load(mask_ptr + row)
    token, after = before + 1, before + kept.to(tl.int64)
    gone = tl.maximum(token - s.recent, 0) // s.leaving * s.leaving
    stores, last_part = kept & (head % s.repeat == 0), part == s.parts - 1

    start, sink = ring * s.ring * s.d, ring * s.sinks * s.d
    # To pyright a kernel's function only raises, as it does outside of a kernel.
    top, mass, total = over_window(  # pyright: ignore[reportGeneralTypeIssues]
        q_ptr, k_ptr, v_ptr, keys_ptr + start, values_ptr + start, frequencies_ptr,
        token, gone, stores, part * s.span, scale, s,
    )  # fmt: skip
    if s.sinks > 0:
        top, mass, total = over_sinks(
            top, mass, total, q_ptr, k_ptr, v_ptr, sink_keys_ptr + sink, sink_values_ptr + sink,
            frequencies_ptr, token, gone, stores & last_part, last_part, scale, s,
        )  # fmt: skip
    recent = fold(top, mass, total)
    # By the count, not the token: a row outside the mask has not written what its token would.
    written = after >= s.written
    virtual = recent
    if s.slots > 0:
        absorbed_ptr += row * absorbed_row + head * absorbed_head
        readout_ptr += row * s.slots * s.e
        virtual = over_virtual(absorbed_ptr, readout_ptr, written & last_part, s)

    complete = True
    if s.parts > 1:
        store_softmax(sums_ptr, totals_ptr, query * s.parts + part, recent, True, s.d, s.block_d)
        if s.slots > 0:
            store_softmax(virtual_ptr, mixes_ptr, query, virtual, last_part, s.e, s.block_e)
        complete = arrive(heads_ptr + query, s.parts)
    if complete:
        answer(
            recent, virtual, sums_ptr, totals_ptr, virtual_ptr, mixes_ptr, q_ptr, bias_ptr,
            weight_ptr, recent_ptr, latent_ptr, head, query, written, alpha, s,
        )  # fmt: skip
        # When all heads of the row have read the count, it counts.
        if arrive(rows_ptr + row, s.heads):
            tl.store(executed_ptr + row, after)


@triton.jit
def answer(
    recent, virtual, sums_ptr, totals_ptr, virtual_ptr, mixes_ptr, q_ptr, bias_ptr,
    weight_ptr, recent_ptr, latent_ptr, head, query, written, alpha, s: constexpr,
):  # fmt: skip
    """Weigh window and memory, this program's or those of all parts, and store both."""
    if s.parts > 1:
        first = query * s.parts
        recent = load_softmax(sums_ptr, totals_ptr, first, s.parts, s.block_parts, s.d, s.block_d)
        if s.slots > 0:
            virtual = load_softmax(virtual_ptr, mixes_ptr, query, 1, 1, s.e, s.block_e)
    share = 1 / recent[1]
    if s.slots > 0:
        logit = gate_logit(q_ptr, bias_ptr, weight_ptr, head, s)
        share, of_memory = shares(recent, virtual, logit, alpha, written, s)
        store_vector(latent_ptr + query * s.e, virtual[2] * of_memory, True, s.e, s.block_e)
    store_vector(recent_ptr + query * s.d, recent[2] * share, True, s.d, s.block_d)
