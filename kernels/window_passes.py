"""The training attention and its gradients: products and kernels in order."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import Layer
from .window_inputs import Latents, Seen
from .window_launch import (
    Back,
    Call,
    columns_launch,
    forward_launch,
    head_parts,
    latents_launch,
    queries_launch,
    scale,
    sink_parts,
)
from .window_products import add_by_heads, between_heads, side_by_side
from .window_sizes import Sizes

Gradients = dict[str, Tensor | None]


def forward(seen: Seen, layer: Layer, latents: Latents | None) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs `[B, H, T, D]`, and what `backward` needs of the way there.

    That is what window and sinks gave of the output, and the logs of the sums of exponentials in
    both branches, float32 `[2, B, H, T]`. Latents are in the dtype of q.
    """
    sizes = Sizes.of(seen, layer, latents)
    batch, heads, tokens, width = seen.q.shape
    lse = seen.q.new_empty(2, batch, heads, tokens, dtype=torch.float32)
    call = Call(seen, latents, _absorbed(seen, latents, sizes), lse, sizes)
    recent = side_by_side(seen.q, tokens, heads, width)
    mix = None if latents is None else side_by_side(seen.q, tokens, heads, sizes.e)
    forward_launch(call, recent, mix).run()
    if latents is None or mix is None:
        return recent, recent, lse
    y = recent.clone()
    add_by_heads(y, mix, latents.to_value, kept=True)
    return y, recent, lse


def backward(
    seen: Seen,
    layer: Layer,
    latents: Latents | None,
    recent: Tensor,
    lse: Tensor,
    dy: Tensor,
    needed: frozenset[str],
) -> Gradients:
    """Gradients by tensors of `seen`, `latents` and the gate, by name; of those needed at least."""
    sizes = Sizes.of(seen, layer, latents)
    call = Call(seen, latents, _absorbed(seen, latents, sizes), lse, sizes)
    dy = dy.transpose(1, 2).contiguous().transpose(1, 2)
    dlatent = None
    if latents is not None:
        dlatent = side_by_side(dy, dy.shape[2], sizes.heads, sizes.e)
        add_by_heads(dlatent, dy, latents.to_value.transpose(1, 2), kept=False)
    back = Back(recent, dy, dlatent, lse.new_empty(4, *lse.shape[1:]))
    found = _by_queries(call, back)
    if needed & {"keys", "values"}:
        found |= _by_columns(call, back, sinks=False)
    if needed & {"sink_keys", "sink_values"} and sizes.sinks:
        found |= _by_columns(call, back, sinks=True)
    if "readouts" in needed:
        found |= _by_latents(call, back)
    return found


def _joined(latents: Latents, sizes: Sizes) -> Tensor:
    """`[W_K | key]` for all key heads, `[Hkv, D, WIDTH]`, with zeros where alignment needs room."""
    to_key, slot_key = latents.to_key, latents.slot_key
    room = to_key.new_zeros(*to_key.shape[:2], sizes.lead - sizes.e)
    behind = to_key.new_zeros(*to_key.shape[:2], sizes.width - sizes.lead - sizes.slots)
    return torch.cat([to_key, room, slot_key, behind], dim=-1)


def _absorbed(seen: Seen, latents: Latents | None, sizes: Sizes) -> Tensor | None:
    """Queries as the kernels score them against latents, `[B, H, T, WIDTH]`."""
    if latents is None:
        return None
    absorbed = side_by_side(seen.q, seen.q.shape[2], sizes.heads, sizes.width)
    add_by_heads(absorbed, seen.q, _joined(latents, sizes), False, scale(sizes))
    return absorbed


def _by_queries(call: Call, back: Back) -> Gradients:
    """By queries and by what is multiplied with them: all but columns, sinks and read-outs."""
    seen, latents, sizes = call.seen, call.latents, call.sizes
    tokens, heads = seen.q.shape[2], sizes.heads
    dturned = side_by_side(seen.q, tokens, heads, sizes.d)
    dq = side_by_side(seen.q, tokens, heads, sizes.d)
    if latents is None:
        queries_launch(call, back, dq, dturned, None, None, None).run()
        return {"turned_q": dturned, "q": dq if sizes.sinks else None}
    dabsorbed = side_by_side(seen.q, tokens, heads, sizes.width)
    mix = side_by_side(seen.q, tokens, heads, sizes.e)
    dlogit = back.kept.new_empty(back.kept.shape[1:])
    queries_launch(call, back, dq, dturned, dabsorbed, mix, dlogit).run()
    joined = _joined(latents, sizes)
    # The kernel has left there what sinks and gate give.
    begun = sizes.sinks > 0 or sizes.gate == "query"
    add_by_heads(dq, dabsorbed, joined.transpose(1, 2), begun, scale(sizes))
    by_key = between_heads(seen.q, dabsorbed, joined) * scale(sizes)
    by_slot = dabsorbed[..., sizes.lead : sizes.lead + sizes.slots]
    return {
        "turned_q": dturned,
        "q": dq,
        "to_key": by_key[..., : sizes.e],
        "slot_key": by_key[..., sizes.lead : sizes.lead + sizes.slots],
        "to_value": between_heads(mix, back.dy, latents.to_value),
        "slot_bias": by_slot.sum((0, 2), dtype=torch.float32),
        **_by_gate(call, dlogit),
    }


def _by_gate(call: Call, dlogit: Tensor) -> Gradients:
    """By what is learned of the gate; `dlogit` is of each query, `[B, H, T]`."""
    assert call.latents is not None
    gate, q = call.latents.gate, call.seen.q
    found: Gradients = {}
    if gate.bias is not None:
        found["bias"] = dlogit.sum((0, 2)).view(gate.bias.shape[0], -1).sum(1)
    if gate.weight is not None:
        like = gate.weight[:, None]
        found["weight"] = between_heads(dlogit[..., None].to(q.dtype), q, like)[:, 0]
    return found


def _by_columns(call: Call, back: Back, sinks: bool) -> Gradients:
    """By columns of the window, or by sinks."""
    seen = call.seen
    keys = seen.sink_keys if sinks else seen.keys
    batch, kv_heads, columns, width = keys.shape
    parts, dtype = (sink_parts(call), torch.float32) if sinks else (1, keys.dtype)
    shape = (parts, batch, columns, kv_heads, width)
    dkeys, dvalues = (keys.new_empty(shape, dtype=dtype).transpose(2, 3) for _ in range(2))
    columns_launch(call, back, dkeys, dvalues, sinks).run()
    if not sinks:
        return {"keys": dkeys[0], "values": dvalues[0]}
    return {"sink_keys": dkeys.sum(0), "sink_values": dvalues.sum(0)}


def _by_latents(call: Call, back: Back) -> Gradients:
    """By read-outs, float32 `[B, V, M, E]`."""
    assert call.latents is not None
    readouts = call.latents.readouts
    shape = (head_parts(call), readouts.shape[0], readouts.shape[1:3].numel(), readouts.shape[3])
    dreadouts = readouts.new_empty(shape, dtype=torch.float32)
    latents_launch(call, back, dreadouts).run()
    return {"readouts": dreadouts.sum(0).view(readouts.shape)}
