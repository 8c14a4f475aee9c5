"""One streaming step of a layer's attention in one kernel: positions, ring, window, memory, gate.

Everything that a launch depends on follows from shapes, so that a CUDA graph may hold it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .checks import check_decode, check_device
from .decode_kernel import decode_kernel
from .inputs import Layer, Ring, Token, Virtual
from .launch import Launch
from .workspace import TILE, Split, Workspace, power_of_2

WARPS = 4


def decode(
    token: Token, ring: Ring, layer: Layer, virtual: Virtual | None, workspace: Workspace
) -> tuple[Tensor, Tensor | None]:
    """Answer one query per row, and take the token into the ring in the rows of the mask.

    Window, sinks and virtual tokens share the query as `docs/semantics.md` says; the virtual ones
    are absorbed as in DeepSeek-V2 (arXiv 2405.04434, section 2.1.2). What remains to be done is
    `recent + latent @ W_V`, one product per key head.

    Args:
        token: q, k and v in bfloat16, float16 or float32; their rows may stand apart.
        ring: updated in place, its count too. The memory must have made its step before.
        layer: settings, those that the ring was made for.
        virtual: `None` where no row reads a memory.
        workspace: from `Workspace.of`, for the same shapes; one for each stream of a GPU.

    Returns:
        what window and sinks bring back, `[B, H, D]`, and the mix of the latents, `[B, H, E]`, both
        weighed by the gate, in the dtype of q. Rows outside the mask get values without meaning.

    Raises:
        ValueError: a shape, dtype or head width does not fit, or the device is not supported.
    """
    check_device(token.q.device)
    out = outputs(token, virtual)
    decode_launch(token, ring, layer, virtual, workspace, out).run()
    return out


def outputs(token: Token, virtual: Virtual | None) -> tuple[Tensor, Tensor | None]:
    """Where `decode` writes: `[B, H, D]`, and `[B, H, E]` if there are virtual tokens."""
    recent = token.q.new_empty(token.q.shape)
    if virtual is None:
        return recent, None
    return recent, token.q.new_empty(*token.q.shape[:2], virtual.readout.shape[-1])


def decode_launch(
    token: Token,
    ring: Ring,
    layer: Layer,
    virtual: Virtual | None,
    workspace: Workspace,
    out: tuple[Tensor, Tensor | None],
) -> Launch:
    """The launch behind `decode`, which writes to `out`; its tensors may be on any device."""
    check_decode(token, ring, layer, virtual)
    batch, heads, width = token.q.shape
    block = power_of_2(width)
    arguments = {
        **_tensors(token, ring, workspace),
        **_virtual(virtual),
        "recent_ptr": out[0],
        "latent_ptr": out[1],
        "scale": width**-0.5,
        "H": heads,
        "R": heads // ring.keys.shape[1],
        "D": width,
        "W": layer.capacity,
        "S": ring.sink_keys.shape[2],
        "RECENT": layer.recent,
        "LEAVING": layer.leaving,
        "WRITTEN": layer.written,
        "ROPE": _rope(token, layer),
        "BLOCK_D": block,
        **_parts(workspace.split),
    }
    return Launch(
        decode_kernel, (heads, workspace.split.parts, batch), arguments, {"num_warps": WARPS}
    )


def _tensors(token: Token, ring: Ring, workspace: Workspace) -> dict[str, Any]:
    rows = {f"{name}_row": getattr(token, name).stride(0) for name in ("q", "k", "v")}
    named = token._asdict() | ring._asdict() | workspace.tensors()
    return rows | {f"{name}_ptr": tensor for name, tensor in named.items()}


def _virtual(virtual: Virtual | None) -> dict[str, Any]:
    """What the kernel must know of virtual tokens, or that there are none."""
    if virtual is None:
        names = ("absorbed_ptr", "readout_ptr", "bias_ptr", "weight_ptr")
        sizes = {"M": 0, "E": 0, "BLOCK_M": 1, "BLOCK_E": 1, "GATE": "none", "alpha": 0.0}
        return dict.fromkeys(names) | {"absorbed_row": 0, "absorbed_head": 0} | sizes
    _, slots, latent = virtual.readout.shape
    block = power_of_2(latent)
    return {
        "absorbed_ptr": virtual.absorbed,
        "readout_ptr": virtual.readout,
        "bias_ptr": virtual.gate.bias,
        "weight_ptr": virtual.gate.weight,
        "absorbed_row": virtual.absorbed.stride(0),
        "absorbed_head": virtual.absorbed.stride(1),
        "alpha": float(virtual.gate.alpha),
        "M": slots,
        "E": latent,
        "BLOCK_M": min(max(TILE // block, 1), power_of_2(slots)),
        "BLOCK_E": block,
        "GATE": virtual.gate.kind,
    }


def _rope(token: Token, layer: Layer) -> str:
    if token.frequencies is None:
        return "none"
    return "interleaved" if layer.interleave else "halves"


def _parts(split: Split) -> dict[str, int]:
    lanes = power_of_2(split.parts)
    return {"BLOCK_W": split.lanes, "SPAN": split.span, "PARTS": split.parts, "LANES": lanes}
