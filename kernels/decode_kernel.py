"""One streaming step of a layer's attention, from q, k and v to what its heads bring back.

A program answers one query head of one row over one part of what it sees: a span of the ring, or
sinks and virtual tokens, or all of it where there are heads enough to fill the GPU. `README.md` has
the derivation.
"""

import triton
import triton.language as tl

from .attend import over_sinks, over_virtual, over_window
from .gates import gate_logit, shares
from .handover import arrive, load_softmax, store_softmax
from .tile import fold, store_vector


@triton.jit
def decode_kernel(
    # q [B, H, D], k and v [B, Hkv, D] before RoPE; int64 [B] before this step, bool [B]; [D / 2]
    q_ptr, k_ptr, v_ptr, executed_ptr, mask_ptr, frequencies_ptr,
    # [B, Hkv, W, D] and [B, Hkv, S, D]
    keys_ptr, values_ptr, sink_keys_ptr, sink_values_ptr,
    # [B, H, E + M] scaled, float32 [B, M, E]; of the gate [1|H], [H, D]
    absorbed_ptr, readout_ptr, bias_ptr, weight_ptr,
    # [B, H, D], [B, H, E]; int32 [B], [B, H]; float32 [B, H, PARTS, *], of virtual tokens [B, H, *]
    recent_ptr, latent_ptr, rows_ptr, heads_ptr, sums_ptr, totals_ptr, virtual_ptr, mixes_ptr,
    q_row, k_row, v_row, absorbed_row, absorbed_head, alpha, scale,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
    M: tl.constexpr, E: tl.constexpr, RECENT: tl.constexpr, LEAVING: tl.constexpr,
    WRITTEN: tl.constexpr, GATE: tl.constexpr, ROPE: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
    SPAN: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    head, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    query, ring = row * H + head, row * (H // R) + head // R
    q_ptr += row * q_row + head * D
    k_ptr += row * k_row + head // R * D
    v_ptr += row * v_row + head // R * D
    before, kept = tl.load(executed_ptr + row), tl.load(mask_ptr + row)
    token, after = before + 1, before + kept.to(tl.int64)
    gone = tl.maximum(token - RECENT, 0) // LEAVING * LEAVING
    stores, last_part = kept & (head % R == 0), part == PARTS - 1

    # To pyright a kernel's function only raises, as it does outside of a kernel.
    top, mass, total = over_window(  # pyright: ignore[reportGeneralTypeIssues]
        q_ptr, k_ptr, v_ptr, keys_ptr + ring * W * D, values_ptr + ring * W * D, frequencies_ptr,
        token, gone, stores, part * SPAN, scale, D, W, ROPE, BLOCK_W, BLOCK_D, SPAN,
    )  # fmt: skip
    if S > 0:
        top, mass, total = over_sinks(
            top, mass, total, q_ptr, k_ptr, v_ptr,
            sink_keys_ptr + ring * S * D, sink_values_ptr + ring * S * D, frequencies_ptr,
            token, gone, stores & last_part, last_part, scale, D, W, S, ROPE, BLOCK_W, BLOCK_D,
        )  # fmt: skip
    recent = fold(top, mass, total)
    # By the count, not the token: a row outside the mask has not written what its token would.
    written = after >= WRITTEN
    virtual = recent
    if M > 0:
        virtual = over_virtual(
            absorbed_ptr + row * absorbed_row + head * absorbed_head, readout_ptr + row * M * E,
            tl.where(written & last_part, M, 0), M, E, BLOCK_M, BLOCK_E,
        )  # fmt: skip

    if PARTS > 1:
        store_softmax(sums_ptr, totals_ptr, query * PARTS + part, recent, True, D, BLOCK_D)
        if M > 0:
            store_softmax(virtual_ptr, mixes_ptr, query, virtual, last_part, E, BLOCK_E)
        if arrive(heads_ptr + query, PARTS):
            recent = load_softmax(sums_ptr, totals_ptr, query * PARTS, PARTS, LANES, D, BLOCK_D)
            if M > 0:
                virtual = load_softmax(virtual_ptr, mixes_ptr, query, 1, 1, E, BLOCK_E)
            answer(
                recent, virtual, q_ptr, bias_ptr, weight_ptr, recent_ptr, latent_ptr,
                head, query, written, alpha, M, GATE, D, E, BLOCK_D, BLOCK_E,
            )  # fmt: skip
            advance(executed_ptr + row, rows_ptr + row, after, H)
    else:
        answer(
            recent, virtual, q_ptr, bias_ptr, weight_ptr, recent_ptr, latent_ptr,
            head, query, written, alpha, M, GATE, D, E, BLOCK_D, BLOCK_E,
        )  # fmt: skip
        advance(executed_ptr + row, rows_ptr + row, after, H)


@triton.jit
def answer(
    recent, virtual, q_ptr, bias_ptr, weight_ptr, recent_ptr, latent_ptr,
    head, query, written, alpha,
    M: tl.constexpr, GATE: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Weigh window and memory, and store what each brings back."""
    share = 1 / recent[1]
    if M > 0:
        logit = gate_logit(q_ptr, bias_ptr, weight_ptr, head, GATE, D, BLOCK_D)
        share, of_memory = shares(recent, virtual, logit, alpha, written, GATE)
        store_vector(latent_ptr + query * E, virtual[2] * of_memory, True, E, BLOCK_E)
    store_vector(recent_ptr + query * D, recent[2] * share, True, D, BLOCK_D)


@triton.jit
def advance(executed_ptr, ticket_ptr, after, H: tl.constexpr):
    """Count the row's token when all its heads have read the count."""
    if arrive(ticket_ptr, H):
        tl.store(executed_ptr, after)
