"""One streaming step of the TTT memory in one kernel: ring, update, chunk's end, read-out.

Everything that a launch depends on follows from shapes, so that a CUDA graph may hold it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import INSTEAD, check_device, check_dtype, expect
from .launch import Launch
from .memory_reference import MemoryRows, MemoryWeights
from .memory_step_kernel import memory_step_kernel
from .memory_tiles import Sizes
from .sizes import power_of_2

WIDTHS = range(16, 129)  # of a memory head
HIDDEN = range(16, 257)
WHOLE = 8192  # elements of a matrix that is worked on as one tile
TILE = 4096  # of one that is larger: registers would not hold its update
WARPS = range(4, 17)
EACH_WARP = 256  # elements of a tile


def memory_step(
    features: Tensor,
    count: Tensor,
    mask: Tensor,
    weights: MemoryWeights,
    rows: MemoryRows,
    chunk: int,
) -> None:
    """Advance the memory of the rows of `mask` by one token, in place.

    The new token's features wait; those of the token N before it are learned, by the delta rule
    (arXiv 2406.06484, equation 1) on the features of a network that is trained at test time
    (arXiv 2407.04620, section 2). Where they end a chunk the next version is made and read.
    Computes what `memory_reference.memory_step` does.

    Args:
        features: of the new token, `[B, F]`, F = (2 d + 1) h: keys, values and rates of all heads,
            as projected; rows may stand apart.
        count: tokens before it, int64 `[B]`. Not advanced here: what reads the memory does.
        mask: bool `[B]`; other rows keep their bits.
        weights: of training; version 0 and the step size are float32.
        rows: what the memory holds, float32 but for what waits. That, `features` and the other
            weights may each be bfloat16, float16 or float32.
        chunk: tokens that make one version, C.

    Raises:
        ValueError: a shape, dtype or width does not fit, or the device is not supported.
    """
    check_device(features.device)
    memory_step_launch(features, count, mask, weights, rows, chunk).run()


def memory_step_launch(
    features: Tensor,
    count: Tensor,
    mask: Tensor,
    weights: MemoryWeights,
    rows: MemoryRows,
    chunk: int,
) -> Launch:
    """The launch behind `memory_step`; its tensors may be on any device."""
    _check(features, count, mask, weights, rows)
    sizes = _sizes(weights, rows, chunk)
    hidden = (weights.first, weights.step_size, rows.first, rows.gradient)
    # A linear memory has none of them: its kernel is compiled without and gets a stand-in.
    first_0, step_size, first, gradient = (rows.last if one is None else one for one in hidden)
    arguments = {
        "features": features,
        "features_row": features.stride(0),
        "count": count,
        "mask": mask,
        "bias": weights.rate,
        "slots": weights.slots,
        "first_0": first_0,
        "last_0": weights.last,
        "step_size": step_size,
        "waiting": rows.waiting,
        "first": first,
        "gradient": gradient,
        "last": rows.last,
        "readout": rows.readout,
        "s": sizes,
    }
    warps = min(max(sizes.tile // EACH_WARP, WARPS[0]), WARPS[-1])
    return Launch(
        memory_step_kernel, (features.shape[0], sizes.heads), arguments, {"num_warps": warps}
    )


def _sizes(weights: MemoryWeights, rows: MemoryRows, chunk: int) -> Sizes:
    heads, n, d = weights.last.shape
    block_d, block_n = power_of_2(d), power_of_2(n)
    return Sizes(
        heads=heads,
        d=d,
        n=n,
        slots=weights.slots.shape[1],
        wait=rows.waiting.shape[2],
        chunk=chunk,
        linear=weights.first is None,
        width=rows.waiting.shape[3],
        cap=math.sqrt(n * d),
        block_d=block_d,
        block_n=block_n,
        tile=block_d * block_n if block_d * block_n <= WHOLE else TILE,
    )


def _check(
    features: Tensor, count: Tensor, mask: Tensor, weights: MemoryWeights, rows: MemoryRows
) -> None:
    narrow = {
        "features": features,
        "waiting": rows.waiting,
        "rate": weights.rate,
        "slots": weights.slots,
    }
    for name, tensor in narrow.items():
        check_dtype(name, tensor.dtype)
    heads, n, d = weights.last.shape
    if d not in WIDTHS or n not in HIDDEN:
        raise ValueError(
            f"memory_dim must be from 16 to 128 and hidden_dim from 16 to 256, got {d} and {n}"
            f"{INSTEAD}"
        )
    batch, slots = features.shape[0], weights.slots.shape[1]
    width, wait = heads * (2 * d + 1), rows.waiting.shape[2]
    expect("features", features, (batch, width), features.dtype, packed=1)
    expect("count", count, (batch,), torch.int64)
    expect("mask", mask, (batch,), torch.bool)
    expect("rate", weights.rate, (heads,), weights.rate.dtype)
    expect("slots", weights.slots, (heads, slots, d), weights.slots.dtype)
    expect("waiting", rows.waiting, (batch, 1, wait, width), rows.waiting.dtype)
    expect("last of weights", weights.last, (heads, n, d), torch.float32)
    expect("last of rows", rows.last, (batch, heads, n, d), torch.float32)
    expect("readout", rows.readout, (batch, slots, heads * d), torch.float32)
    _check_hidden(weights, rows)


def _check_hidden(weights: MemoryWeights, rows: MemoryRows) -> None:
    hidden = {
        "first of weights": weights.first,
        "step_size": weights.step_size,
        "first of rows": rows.first,
        "gradient": rows.gradient,
    }
    given = [name for name, tensor in hidden.items() if tensor is not None]
    if given and len(given) < len(hidden):
        raise ValueError(f"a memory has all of {', '.join(hidden)} or none, got {given}")
    batch, heads, n, d = rows.last.shape
    shapes = ((heads, d, n), (1, heads), (batch, heads, d, n), (batch, heads, d, n))
    for (name, tensor), shape in zip(hidden.items(), shapes, strict=True):
        if tensor is not None:
            expect(name, tensor, shape, torch.float32)
