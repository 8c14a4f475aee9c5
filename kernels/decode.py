"""One streaming step of a layer's attention in one kernel: positions, ring, window, memory, gate.

Everything that a launch depends on follows from shapes, so that a CUDA graph may hold it.
"""

from __future__ import annotations

from torch import Tensor

from .checks import check_decode, check_device
from .decode_kernel import decode_kernel
from .inputs import Layer, Ring, Token, Virtual
from .launch import Launch
from .sizes import TILE, Sizes, Split, power_of_2
from .workspace import Workspace

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
    named = token._asdict() | ring._asdict() | workspace.tensors() | _of_virtual(virtual)
    named |= {"recent": out[0], "latent": out[1]}
    arguments = {
        **{f"{name}_ptr": tensor for name, tensor in named.items()},
        **{f"{name}_row": x.stride(0) for name, x in zip("qkv", token[:3], strict=True)},
        "absorbed_row": 0 if virtual is None else virtual.absorbed.stride(0),
        "absorbed_head": 0 if virtual is None else virtual.absorbed.stride(1),
        "alpha": 0.0 if virtual is None else float(virtual.gate.alpha),
        "scale": token.q.shape[-1] ** -0.5,
        "s": _sizes(token, ring, layer, virtual, workspace.split),
    }
    batch, heads, _ = token.q.shape
    grid = (heads, workspace.split.parts, batch)
    return Launch(decode_kernel, grid, arguments, {"num_warps": WARPS})


def _of_virtual(virtual: Virtual | None) -> dict[str, Tensor | None]:
    if virtual is None:
        return dict.fromkeys(("absorbed", "readout", "bias", "weight"))
    gate = virtual.gate
    return {
        "absorbed": virtual.absorbed,
        "readout": virtual.readout,
        "bias": gate.bias,
        "weight": gate.weight,
    }


def _sizes(token: Token, ring: Ring, layer: Layer, virtual: Virtual | None, split: Split) -> Sizes:
    _, heads, width = token.q.shape
    slots, latent = (0, 0) if virtual is None else virtual.readout.shape[1:]
    block_e = power_of_2(max(latent, 1))
    turned = "interleaved" if layer.interleave else "halves"
    return Sizes(
        heads=heads,
        repeat=heads // ring.keys.shape[1],
        d=width,
        ring=layer.capacity,
        sinks=ring.sink_keys.shape[2],
        slots=slots,
        e=latent,
        recent=layer.recent,
        leaving=layer.leaving,
        written=layer.written,
        gate="none" if virtual is None else virtual.gate.kind,
        rope="none" if token.frequencies is None else turned,
        block_d=power_of_2(width),
        block_e=block_e,
        lanes=split.lanes,
        block_m=min(max(TILE // block_e, 1), power_of_2(max(slots, 1))),
        span=split.span,
        parts=split.parts,
        block_parts=power_of_2(split.parts),
    )
