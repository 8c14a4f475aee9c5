"""What the training attention can do, said in a sentence where it cannot."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import INSTEAD, check_format, check_gate, expect
from .inputs import Layer
from .window_inputs import Latents, Seen

WIDEST = 512  # read-outs; wider sums of a tile of queries would not fit into registers


def check_window(seen: Seen, layer: Layer, latents: Latents | None) -> None:
    """Raise `ValueError` where an argument of `windowed_attention` does not fit the others."""
    batch, heads, tokens, width = seen.q.shape
    dtype = seen.q.dtype
    check_format(dtype, width)
    if layer.recent < 1 or layer.chunk < 1:
        raise ValueError(f"recent and chunk must be 1 or more, got {layer}{INSTEAD}")
    kv_heads, columns = seen.keys.shape[1:3]
    if heads % kv_heads:
        raise ValueError(f"q must have a multiple of {kv_heads} heads, those of keys, got {heads}")
    if not 1 <= tokens <= columns:
        raise ValueError(f"q must have from 1 to {columns} tokens, those of keys, got {tokens}")
    sinks = seen.sink_keys.shape[2]
    shapes = {
        "q": (heads, tokens),
        "turned_q": (heads, tokens),
        "keys": (kv_heads, columns),
        "values": (kv_heads, columns),
        "sink_keys": (kv_heads, sinks),
        "sink_values": (kv_heads, sinks),
    }
    for name, (of_heads, length) in shapes.items():
        packed = 1 if length else None
        expect(name, getattr(seen, name), (batch, of_heads, length, width), dtype, packed)
    expect("start", seen.start, (batch,), torch.int64)
    if latents is not None:
        _check_latents(latents, seen.q, kv_heads)


def check_latent_sizes(slots: int, latent: int) -> None:
    """Raise `ValueError` unless the kernels can do so many virtual tokens of that width."""
    if not (1 <= latent <= WIDEST and 1 <= slots <= WIDEST):
        raise ValueError(
            f"latents must be from 1 to {WIDEST} wide and as many, got {slots} of {latent}{INSTEAD}"
        )


def _check_latents(latents: Latents, q: Tensor, kv_heads: int) -> None:
    batch, heads, _, width = q.shape
    versions, slots, latent = latents.readouts.shape[1:]
    check_latent_sizes(slots, latent)
    expect("readouts", latents.readouts, (batch, versions, slots, latent), torch.float32)
    shapes = {
        "to_key": (kv_heads, width, latent),
        "slot_key": (kv_heads, width, slots),
        "to_value": (kv_heads, latent, width),
        "slot_bias": (heads, slots),
    }
    for name, shape in shapes.items():
        weight = getattr(latents, name)
        if weight is not None:
            expect(name, weight, shape, weight.dtype, packed=None if name == "slot_bias" else 0)
    check_gate(latents.gate, q[:, :, 0])
