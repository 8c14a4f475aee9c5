"""What the kernels can do, said in a sentence where they cannot."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .inputs import GATES, Gate, Layer, Ring, Token, Virtual

INSTEAD = "; choose the reference path with TTT_CACHE_BACKEND=reference"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = range(32, 129, 16)
CAPABILITY = (8, 0)
TRITON = (3, 4)  # `triton.knobs`


def check_device(device: torch.device) -> None:
    """Raise `ValueError` unless Triton and the device can run the kernels."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < TRITON:
        raise ValueError(f"triton must be 3.4 or newer, got {triton.__version__}{INSTEAD}")
    from triton import knobs  # not in older versions

    if knobs.runtime.interpret:
        return
    if device.type != "cuda" or torch.version.hip is not None:
        raise ValueError(f"device must be an NVIDIA GPU, got {device}{INSTEAD}")
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        found = ".".join(map(str, capability))
        raise ValueError(f"device must have compute capability 8.0 or newer, got {found}{INSTEAD}")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise `ValueError` unless the kernels load and store it."""
    if dtype not in DTYPES:
        names = ", ".join(str(one).removeprefix("torch.") for one in DTYPES)
        raise ValueError(f"{name} must be one of {names}, got {dtype}{INSTEAD}")


def check_format(dtype: torch.dtype, head_dim: int) -> None:
    """Raise `ValueError` unless attention kernels can do heads of that width in that dtype."""
    check_dtype("dtype", dtype)
    check_head_dim(head_dim)


def check_head_dim(head_dim: int) -> None:
    """Raise `ValueError` unless attention kernels can do heads of that width."""
    if head_dim not in HEAD_DIMS:
        raise ValueError(
            f"head_dim must be a multiple of 16 from 32 to 128, got {head_dim}{INSTEAD}"
        )


def check_decode(token: Token, ring: Ring, layer: Layer, virtual: Virtual | None) -> None:
    """Raise `ValueError` where an argument of `decode` does not fit the others."""
    batch, heads, width = token.q.shape
    check_format(token.q.dtype, width)
    kv_heads = ring.keys.shape[1]
    if heads % kv_heads:
        raise ValueError(f"q must have a multiple of {kv_heads} heads, those of keys, got {heads}")
    of_ring = (batch, kv_heads, layer.capacity, width)
    of_sinks = (batch, kv_heads, ring.sink_keys.shape[2], width)
    dtype = token.q.dtype
    expect("q", token.q, (batch, heads, width), dtype, packed=2)
    expect("k", token.k, (batch, kv_heads, width), dtype, packed=2)
    expect("v", token.v, (batch, kv_heads, width), dtype, packed=2)
    expect("mask", token.mask, (batch,), torch.bool)
    expect("executed", ring.executed, (batch,), torch.int64)
    expect("keys", ring.keys, of_ring, dtype)
    expect("values", ring.values, of_ring, dtype)
    expect("sink_keys", ring.sink_keys, of_sinks, dtype)
    expect("sink_values", ring.sink_values, of_sinks, dtype)
    if token.frequencies is not None:
        expect("frequencies", token.frequencies, (width // 2,), torch.float32)
    if virtual is not None:
        _check_virtual(virtual, token.q)


def _check_virtual(virtual: Virtual, q: Tensor) -> None:
    batch, heads, _ = q.shape
    slots, latent = virtual.readout.shape[-2:]
    expect("readout", virtual.readout, (batch, slots, latent), torch.float32)
    expect("absorbed", virtual.absorbed, (batch, heads, latent + slots), q.dtype, packed=1)
    check_gate(virtual.gate, q)


def check_gate(gate: Gate, q: Tensor) -> None:
    """Raise `ValueError` unless a gate has the tensors that its kind has; `q` is `[B, H, D]`."""
    _, heads, width = q.shape
    if gate.kind not in GATES:
        raise ValueError(f"gate must be one of {', '.join(GATES)}, got {gate.kind!r}")
    wanted = {
        "bias": None if gate.kind == "fixed" else (1 if gate.kind == "layer" else heads,),
        "weight": (heads, width) if gate.kind == "query" else None,
    }
    for name, shape in wanted.items():
        found = getattr(gate, name)
        if (found is None) != (shape is None):
            needed = "none" if shape is None else f"one of shape {shape}"
            raise ValueError(f"gate={gate.kind!r} needs {needed} as its {name}")
        if found is not None and shape is not None:
            expect(name, found, shape, found.dtype)


def expect(
    name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, packed: int | None = None
) -> None:
    """Check shape and dtype, and that the last `packed` axes (default: all) have no gaps."""
    if x.shape != shape or x.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} {shape}, got {x.dtype} {tuple(x.shape)}")
    one = x if packed is None else x[(0,) * (x.dim() - packed)]
    if x.shape[0] and not one.is_contiguous():
        raise ValueError(f"{name} must have no gaps between its elements, got strides {x.stride()}")
