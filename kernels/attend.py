"""What one query sees: the window, the sinks, the virtual tokens; and the state that it writes."""

import triton
import triton.language as tl

from .constant import constexpr
from .rotary import load_turned
from .tile import fold, hide, load_slots, load_vector, no_softmax, store_vector, take_in


@triton.jit
def over_window(
    q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, frequencies_ptr,
    token, gone, stores, begin, scale, s: constexpr,
):  # fmt: skip
    """Put the token into its slot of the ring if that is in this span, and attend to the span.

    Args:
        token: number n of the token that asks; it sees the tokens `gone + 1 .. n`.
        stores: whether this program writes state.
        begin: first slot of the span.
    """
    own, seen = ((token - 1) % s.ring).to(tl.int32), (token - gone).to(tl.int32)
    q = load_turned(q_ptr, token - 1, frequencies_ptr, s) * scale
    k = load_turned(k_ptr, token - 1, frequencies_ptr, s)
    k = k.to(keys_ptr.dtype.element_ty).to(tl.float32)
    v = load_vector(v_ptr, s.d, s.block_d)
    here = stores & (own >= begin) & (own < begin + s.span)
    store_vector(keys_ptr + own * s.d, k, here, s.d, s.block_d)
    store_vector(values_ptr + own * s.d, v, here, s.d, s.block_d)
    top, mass, total = no_softmax(s.lanes, s.block_d)
    for start in range(begin, min(begin + s.span, s.ring), s.lanes):
        slots = start + tl.arange(0, s.lanes)
        age = own - slots + tl.where(slots > own, s.ring, 0)
        visible = (age < seen) & (slots < s.ring)
        # The token's own slot is not read: another program may be storing it.
        old, new = visible & (age > 0), (age == 0)[:, None]
        keys = tl.where(new, k[None, :], load_slots(keys_ptr, slots, old, s.d, s.block_d))
        values = tl.where(new, v[None, :], load_slots(values_ptr, slots, old, s.d, s.block_d))
        top, mass, total = take_in(top, mass, total, q, keys, values, hide(visible))
    return top, mass, total


@triton.jit
def over_sinks(
    top, mass, total, q_ptr, k_ptr, v_ptr, keys_ptr, values_ptr, frequencies_ptr,
    token, gone, stores, attends, scale, s: constexpr,
):  # fmt: skip
    """Keep the token if it is one of the first S, and attend to those that have left the window.

    A sink's key is turned once, to its constant distance, and scored with the query before RoPE.
    """
    if stores & (token <= s.sinks):
        slot = (token - 1) * s.d
        k = load_turned(k_ptr, token - s.ring - s.sinks, frequencies_ptr, s)
        store_vector(keys_ptr + slot, k, True, s.d, s.block_d)
        v = load_vector(v_ptr, s.d, s.block_d)
        store_vector(values_ptr + slot, v, True, s.d, s.block_d)
    q = load_vector(q_ptr, s.d, s.block_d) * scale
    seen = tl.where(attends, tl.minimum(gone, s.sinks), 0).to(tl.int32)
    for start in range(0, seen, s.lanes):
        slots = start + tl.arange(0, s.lanes)
        keys = load_slots(keys_ptr, slots, slots < seen, s.d, s.block_d)
        values = load_slots(values_ptr, slots, slots < seen, s.d, s.block_d)
        top, mass, total = take_in(top, mass, total, q, keys, values, hide(slots < seen))
    return top, mass, total


@triton.jit
def over_virtual(absorbed_ptr, readout_ptr, reads, s: constexpr):
    """The softmax over virtual tokens, folded; over none of them unless the query `reads`.

    A read-out is both key and value: the query is absorbed, the values are made of the mix.
    """
    absorbed = load_vector(absorbed_ptr, s.e, s.block_e)
    top, mass, total = no_softmax(s.block_m, s.block_e)
    for start in range(0, tl.where(reads, s.slots, 0), s.block_m):
        m = start + tl.arange(0, s.block_m)
        there = m < s.slots
        latents = load_slots(readout_ptr, m, there, s.e, s.block_e)
        by_slot = tl.load(absorbed_ptr + s.e + m, mask=there, other=float("-inf")).to(tl.float32)
        top, mass, total = take_in(top, mass, total, absorbed, latents, latents, by_slot)
    return fold(top, mass, total)
