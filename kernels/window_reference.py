"""What the training attention computes, slowly and in plain PyTorch: its specification.

Every query is scored against every column and every virtual token of every version, and masks say
what it sees. Any dtype; gradients by autograd. In float64 it is what the kernels are compared with;
in their own dtype it says how much accuracy that dtype costs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import Layer
from .reference import share
from .window_inputs import Latents, Seen


def windowed_attention(seen: Seen, layer: Layer, latents: Latents | None) -> Tensor:
    """As `ttt_cache.kernels.window.windowed_attention`, in the dtype of q and on any device."""
    number = seen.start[:, None] + torch.arange(1, seen.q.shape[2] + 1, device=seen.q.device)
    scores, values = _look_back(seen, layer, number)
    if latents is None:
        return scores.softmax(-1) @ values
    written = (number >= layer.written)[:, None, :, None]  # [B, 1, T, 1]
    virtual, readouts = _remember(seen, layer, latents, number)
    virtual = torch.where(written, virtual, 0)  # of which `share` makes weights of 0
    gate = latents.gate
    if gate.weight is not None:
        gate = gate._replace(weight=gate.weight[:, None])
    if gate.bias is not None:
        gate = gate._replace(bias=gate.bias[:, None])
    on_recent, on_virtual = share(scores, virtual, written, seen.q, gate)
    mixed = on_virtual @ readouts[:, None]  # [B, H, T, E]
    return on_recent @ values + mixed @ _by_query_head(latents.to_value.to(mixed.dtype), seen)


def _look_back(seen: Seen, layer: Layer, number: Tensor) -> tuple[Tensor, Tensor]:
    """Scores over columns and sinks, `[B, H, T, L + S]`, -inf where hidden, and their values."""
    columns = seen.keys.shape[2]
    gone = (number - layer.recent).clamp(min=0) // layer.leaving * layer.leaving
    gone, number = gone[..., None], number[..., None]
    column = number[:, -1:] - columns + torch.arange(1, columns + 1, device=number.device)
    sink = torch.arange(1, seen.sink_keys.shape[2] + 1, device=number.device)
    visible = torch.cat([(column > gone) & (column <= number), sink <= gone], dim=-1)[:, None]
    scale = seen.q.shape[-1] ** -0.5
    empty = (column < 1)[:, 0, :, None][:, None]  # [B, 1, L, 1]
    kept = [_by_query_head(x.masked_fill(empty, 0), seen) for x in (seen.keys, seen.values)]
    sinks = [_by_query_head(x, seen) for x in (seen.sink_keys, seen.sink_values)]
    scores = [
        scale * seen.turned_q @ kept[0].transpose(-1, -2),
        scale * seen.q @ sinks[0].transpose(-1, -2),
    ]
    scores = torch.cat(scores, dim=-1).masked_fill(~visible, float("-inf"))
    return scores, torch.cat([kept[1], sinks[1]], dim=2)


def _remember(seen: Seen, layer: Layer, latents: Latents, number: Tensor) -> tuple[Tensor, Tensor]:
    """Scores over all versions' virtual tokens, -inf but for those of a query's own, and values.

    `[B, H, T, V M]`, and read-outs `[B, V M, E]`.
    """
    versions, slots = latents.readouts.shape[1:3]
    wait = 0 if layer.arrived else layer.recent

    def version(token: Tensor) -> Tensor:
        return (token - wait).clamp(min=0) // layer.chunk

    current = (version(number) - version(seen.start)[:, None]).clamp(max=versions - 1)
    visible = current[..., None] == torch.arange(versions, device=number.device)
    visible = visible.repeat_interleave(slots, dim=-1)[:, None]
    dtype = seen.q.dtype
    readouts, q = latents.readouts.to(dtype).flatten(1, 2), seen.q.shape[-1] ** -0.5 * seen.q
    absorbed = q @ _by_query_head(latents.to_key.to(dtype), seen)
    by_slot = q @ _by_query_head(latents.slot_key.to(dtype), seen)
    if latents.slot_bias is not None:
        by_slot = by_slot + latents.slot_bias.to(dtype)[:, None]
    scores = absorbed @ readouts[:, None].transpose(-1, -2) + by_slot.repeat(1, 1, 1, versions)
    return scores.masked_fill(~visible, float("-inf")), readouts


def _by_query_head(x: Tensor, seen: Seen) -> Tensor:
    """What each key head has, `[*, Hkv, *, *]`, for each query head that shares it."""
    return x.repeat_interleave(seen.q.shape[1] // seen.keys.shape[1], dim=-3)
