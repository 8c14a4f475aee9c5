"""Attention of many new tokens to window, sinks and virtual tokens, with its gradients.

Everything that a launch depends on follows from shapes. `README.md` has the derivation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import window_passes as passes
from .autocast import full_precision
from .checks import check_device
from .inputs import Gate, Layer
from .once import first_order
from .window_checks import check_window
from .window_inputs import Latents, Seen

MULTIPLIED = ("to_key", "slot_key", "to_value")
OF_LATENTS = ("readouts", *MULTIPLIED, "slot_bias", "bias", "weight")
NAMES = (*Seen._fields, *OF_LATENTS)


class Settings(NamedTuple):
    """What is no tensor: of the layer, and of the gate."""

    layer: Layer
    gate: str
    alpha: float


def windowed_attention(seen: Seen, layer: Layer, latents: Latents | None) -> Tensor:
    """Answer the queries of T new tokens of every row, differentiably.

    Window, sinks and virtual tokens share a query as `docs/semantics.md` says. Virtual tokens are
    absorbed as in DeepSeek-V2 (arXiv 2405.04434, section 2.1.2), softmaxes are taken tile by tile
    and made again on the way back as in FlashAttention-2 (arXiv 2307.08691): no more outlives the
    call than its inputs, its output and two numbers for each query and head. The same inputs give
    the same gradients, bit for bit. Gradients of gradients are not made.

    Args:
        seen: queries, keys and values in bfloat16, float16 or float32, all the same.
        layer: settings.
        latents: what the memory is read through; weights may be in other dtypes than q, in which
            they are multiplied. `None` where no row reads a memory.

    Returns:
        outputs `[B, H, T, D]` in the dtype of q, heads of a token side by side in memory.

    Raises:
        ValueError: a shape, dtype or width does not fit, or the device is not supported.
    """
    check_device(seen.q.device)
    check_window(seen, layer, latents)
    given: dict[str, Tensor | None] = dict.fromkeys(OF_LATENTS)
    settings = Settings(layer, "none", 0.0)
    if latents is not None:
        gate, dtype = latents.gate, seen.q.dtype
        settings = Settings(layer, gate.kind, gate.alpha)
        given = {
            name: x for name, x in (latents._asdict() | gate._asdict()).items() if name in given
        }
        given |= {name: getattr(latents, name).to(dtype) for name in MULTIPLIED}
    y = _Windowed.apply(settings, *seen, *(given[name] for name in OF_LATENTS))
    assert y is not None
    return y


class _Windowed(torch.autograd.Function):
    """Settings and the tensors by name on the way there, their gradients on the way back."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, *given: Tensor | None) -> Tensor:
        tensors = dict(zip(NAMES, given, strict=True))
        q, readouts = tensors["q"], tensors["readouts"]
        assert q is not None
        if readouts is not None:
            tensors["readouts"] = readouts.to(q.dtype)  # kept for the way back as it is multiplied
        seen, latents = _gathered(settings, tensors)
        with full_precision(q):
            y, recent, lse = passes.forward(seen, settings.layer, latents)
        ctx.settings = settings
        ctx.save_for_backward(*tensors.values(), recent, lse)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *given, recent, lse = ctx.saved_tensors
        tensors: dict[str, Tensor | None] = dict(zip(NAMES, given, strict=True))
        seen, latents = _gathered(ctx.settings, tensors)
        asked = zip(NAMES, ctx.needs_input_grad[1:], strict=True)
        needed = frozenset(name for name, needs in asked if needs)
        with full_precision(dy):
            found = passes.backward(seen, ctx.settings.layer, latents, recent, lse, dy, needed)
        gradients = (found.get(name) if name in needed else None for name in NAMES)
        return (None, *map(_in_dtype, gradients, given, NAMES))


def _in_dtype(gradient: Tensor | None, of: Tensor | None, name: str) -> Tensor | None:
    """The gradient in the dtype of its tensor; read-outs are float32, though not as kept."""
    if gradient is None or of is None or name == "readouts":
        return gradient
    return gradient.to(of.dtype)


def _gathered(settings: Settings, tensors: dict[str, Tensor | None]) -> tuple[Seen, Latents | None]:
    """The tensors as the passes take them."""
    seen = Seen(*(_there(tensors[name]) for name in Seen._fields))
    if tensors["readouts"] is None:
        return seen, None
    gate = Gate(settings.gate, settings.alpha, tensors["bias"], tensors["weight"])
    own = {name: _there(tensors[name]) for name in ("readouts", *MULTIPLIED)}
    return seen, Latents(**own, slot_bias=tensors["slot_bias"], gate=gate)


def _there(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
