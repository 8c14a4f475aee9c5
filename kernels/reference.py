"""What the decode kernel computes, slowly and in plain PyTorch: its specification.

In float64 it is what the kernel is compared with; in the kernel's own dtype it says how much
accuracy that dtype costs. `tests/test_kernels_decode.py` compares it with the cache's own step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import Gate, Layer, Ring, Token, Virtual


def decode(
    token: Token, ring: Ring, layer: Layer, virtual: Virtual | None
) -> tuple[Tensor, Tensor | None]:
    """As `ttt_cache.kernels.decode.decode`, in the dtype of q and on any device."""
    number = ring.executed + 1  # [B], of the token that asks
    gone = (number - layer.recent).clamp(min=0) // layer.leaving * layer.leaving
    _keep(token, ring, layer, number)
    ring.executed.add_(token.mask)
    scores, values = _look_back(token, ring, layer, number, gone)
    if virtual is None:
        return _weigh(scores.softmax(-1), values), None
    written = (ring.executed >= layer.written)[:, None, None]
    latents = torch.where(written, virtual.readout.to(token.q.dtype), 0)
    width = latents.shape[-1]
    absorbed, by_slot = virtual.absorbed.split([width, latents.shape[1]], dim=-1)
    on_virtual = absorbed @ latents.transpose(-1, -2) + by_slot  # [B, H, M]
    on_recent, on_virtual = share(scores, on_virtual, written, token.q, virtual.gate)
    return _weigh(on_recent, values), on_virtual @ latents


def share(
    recent: Tensor, virtual: Tensor, written: Tensor, q: Tensor, gate: Gate
) -> tuple[Tensor, Tensor]:
    """Scores `[B, H, L]` and `[B, H, M]` to weights, 0 on a memory that is not written."""
    bias = 0.0 if gate.bias is None else gate.bias.to(q.dtype)[:, None]  # [1|H, 1]
    if gate.kind == "joint":
        virtual = (virtual + bias).masked_fill(~written, float("-inf"))
        weights = torch.cat([recent, virtual], dim=-1).softmax(-1)
        on_recent, on_virtual = weights.split([recent.shape[-1], virtual.shape[-1]], dim=-1)
        return on_recent, on_virtual
    on_recent, on_virtual = recent.softmax(-1), virtual.softmax(-1) * written
    if gate.kind == "residual":
        return on_recent, torch.as_tensor(bias).tanh() * on_virtual
    if gate.kind == "fixed":
        alpha = torch.full_like(written, gate.alpha, dtype=q.dtype)
    elif gate.weight is not None:
        alpha = ((q * gate.weight.to(q.dtype)).sum(-1, keepdim=True) + bias).sigmoid()
    else:
        alpha = torch.as_tensor(bias).sigmoid()
    alpha = torch.where(written, alpha, 1)
    return alpha * on_recent, (1 - alpha) * on_virtual


def turned(x: Tensor, position: Tensor, frequencies: Tensor | None, interleave: bool) -> Tensor:
    """`x` `[B, H, D]` turned to `position` `[B]`; angles are rounded as `frequencies` are."""
    if frequencies is None:
        return x
    angle = (position.to(frequencies.dtype)[:, None] * frequencies).to(x.dtype)[:, None]
    shape = (-1, 2) if interleave else (2, -1)
    first, second = x.unflatten(-1, shape).unbind(-1 if interleave else -2)
    cos, sin = angle.cos(), angle.sin()
    pair = first * cos - second * sin, first * sin + second * cos
    return torch.stack(pair, dim=-1 if interleave else -2).flatten(-2)


def _keep(token: Token, ring: Ring, layer: Layer, number: Tensor) -> None:
    """The token's key and value into their slots, in the rows of the mask."""
    for row in token.mask.nonzero().flatten().tolist():
        slot, one = (int(number[row]) - 1) % layer.capacity, slice(row, row + 1)
        key = turned(token.k[one], number[one] - 1, token.frequencies, layer.interleave)
        ring.keys[row, :, slot], ring.values[row, :, slot] = key[0], token.v[row]
        sinks = ring.sink_keys.shape[2]
        if number[row] <= sinks:
            distance = number[one] - layer.capacity - sinks
            key = turned(token.k[one], distance, token.frequencies, layer.interleave)
            slot = int(number[row]) - 1
            ring.sink_keys[row, :, slot], ring.sink_values[row, :, slot] = key[0], token.v[row]


def _look_back(
    token: Token, ring: Ring, layer: Layer, number: Tensor, gone: Tensor
) -> tuple[Tensor, Tensor]:
    """Scores over window and sinks, `[B, H, W + S]`, and values `[B, H, W + S, D]`."""
    repeat, scale = token.q.shape[1] // token.k.shape[1], token.q.shape[-1] ** -0.5
    slots = torch.arange(layer.capacity, device=number.device)
    age = (number[:, None] - 1 - slots) % layer.capacity
    index = torch.arange(1, ring.sink_keys.shape[2] + 1, device=number.device)
    visible = torch.cat([age < (number - gone)[:, None], index <= gone[:, None]], dim=1)
    q = turned(token.q, number - 1, token.frequencies, layer.interleave)
    on_ring = _score(q * scale, ring.keys.repeat_interleave(repeat, 1))
    on_sinks = _score(token.q * scale, ring.sink_keys.repeat_interleave(repeat, 1))
    scores = torch.cat([on_ring, on_sinks], dim=-1)
    values = torch.cat([ring.values, ring.sink_values], dim=2).repeat_interleave(repeat, 1)
    return scores.masked_fill(~visible[:, None], float("-inf")), values


def _score(q: Tensor, keys: Tensor) -> Tensor:
    """`[B, H, D]` and `[B, H, L, D]` -> `[B, H, L]`."""
    return (keys @ q[..., None]).squeeze(-1)


def _weigh(weights: Tensor, values: Tensor) -> Tensor:
    """`[B, H, L]` and `[B, H, L, D]` -> `[B, H, D]`."""
    return (weights[:, :, None] @ values).squeeze(2)
