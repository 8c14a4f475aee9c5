"""What one query sees: the window, the sinks, the virtual tokens; and the state that it writes."""

import triton
import triton.language as tl

from .rotary import load_turned
from .tile import fold, hide, load_slots, load_vector, no_softmax, store_vector, take_in


@triton.jit
def over_window(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, frequencies_ptr, token, gone, stores, begin, scale,
    D: tl.constexpr, W: tl.constexpr, ROPE: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Put the token into its slot of the ring if that is in this span, and attend to the span.

    Args:
        token: number n of the token that asks; it sees the tokens `gone + 1 .. n`.
        stores: whether this program writes state.
        begin: first slot of the span.
    """
    own, seen = ((token - 1) % W).to(tl.int32), (token - gone).to(tl.int32)
    q = load_turned(q_ptr, token - 1, frequencies_ptr, ROPE, D, BLOCK_D) * scale
    k = load_turned(k_ptr, token - 1, frequencies_ptr, ROPE, D, BLOCK_D)
    k = k.to(keys_ptr.dtype.element_ty).to(tl.float32)
    v = load_vector(v_ptr, D, BLOCK_D)
    here = stores & (own >= begin) & (own < begin + SPAN)
    store_vector(keys_ptr + own * D, k, here, D, BLOCK_D)
    store_vector(values_ptr + own * D, v, here, D, BLOCK_D)
    top, mass, total = no_softmax(BLOCK_W, BLOCK_D)
    for start in range(begin, min(begin + SPAN, W), BLOCK_W):
        slots = start + tl.arange(0, BLOCK_W)
        age = own - slots + tl.where(slots > own, W, 0)
        visible = (age < seen) & (slots < W)
        # The token's own slot is not read: another program may be storing it.
        old, new = visible & (age > 0), (age == 0)[:, None]
        keys = tl.where(new, k[None, :], load_slots(keys_ptr, slots, old, D, BLOCK_D))
        values = tl.where(new, v[None, :], load_slots(values_ptr, slots, old, D, BLOCK_D))
        top, mass, total = take_in(top, mass, total, q, keys, values, hide(visible))
    return top, mass, total


@triton.jit
def over_sinks(
    top, mass, total,
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, frequencies_ptr, token, gone, stores, attends, scale,
    D: tl.constexpr, W: tl.constexpr, S: tl.constexpr, ROPE: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Keep the token if it is one of the first S, and attend to those that have left the window.

    A sink's key is turned once, to its constant distance, and scored with the query before RoPE.
    """
    if stores & (token <= S):
        k = load_turned(k_ptr, token - W - S, frequencies_ptr, ROPE, D, BLOCK_D)
        store_vector(keys_ptr + (token - 1) * D, k, True, D, BLOCK_D)
        v = load_vector(v_ptr, D, BLOCK_D)
        store_vector(values_ptr + (token - 1) * D, v, True, D, BLOCK_D)
    q = load_vector(q_ptr, D, BLOCK_D) * scale
    seen = tl.where(attends, tl.minimum(gone, S), 0).to(tl.int32)
    for start in range(0, seen, BLOCK_W):
        slots = start + tl.arange(0, BLOCK_W)
        keys = load_slots(keys_ptr, slots, slots < seen, D, BLOCK_D)
        values = load_slots(values_ptr, slots, slots < seen, D, BLOCK_D)
        top, mass, total = take_in(top, mass, total, q, keys, values, hide(slots < seen))
    return top, mass, total


@triton.jit
def over_virtual(
    absorbed_ptr, readout_ptr, stop,
    M: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The softmax over the first `stop` (M or none) virtual tokens, folded.

    A read-out is both key and value: the query is absorbed, the values are made of the mix.
    """
    absorbed = load_vector(absorbed_ptr, E, BLOCK_E)
    top, mass, total = no_softmax(BLOCK_M, BLOCK_E)
    for start in range(0, stop, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        latents = load_slots(readout_ptr, m, m < M, E, BLOCK_E)
        by_slot = tl.load(absorbed_ptr + E + m, mask=m < M, other=float("-inf")).to(tl.float32)
        top, mass, total = take_in(top, mass, total, absorbed, latents, latents, by_slot)
    return fold(top, mass, total)
