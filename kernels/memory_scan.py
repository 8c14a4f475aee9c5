"""The scan of the TTT memory in training, and its gradient, in a handful of launches.

Everything that a launch depends on follows from shapes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import check_device
from .memory_scan_inputs import By, Made, Scan, check_scan
from .memory_scan_launch import back_launches, scan_launch
from .once import first_order


def memory_scan(
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    first: Tensor | None,
    last: Tensor,
    total: Tensor | None,
    rate: Tensor | None,
    norm: Tensor | None,
    closes: Tensor,
    chunk: int,
    cap: float,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Take in K chunks of N networks, one after the other; differentiable by every float tensor.

    The delta rule within a chunk is that of arXiv 2406.06484, section 3, on the features of a
    network that is trained at test time (arXiv 2407.04620, section 2). Computes what
    `memory_scan_reference.memory_scan` does. Nothing but the weights after each chunk is kept for
    the way back, which makes again what it needs.

    Args:
        k, v: unit keys and normed values, `[K, N, L, d]`; a token of zeros changes nothing.
        eta: rates, `[K, N, L, 1]`.
        first, last: W1 `[N, d, n]` and F `[N, n, d]` at the start.
        total: W1's gradient by tokens of the first chunk taken in before, `[N, d, n]`.
        rate, norm: of W1's step, `[N, 1, 1]`, and of its columns at version 0, `[N, 1, n]`.
            A linear memory has `None` for first, total, rate and norm.
        closes: which networks end which chunk, bool `[K, N, 1, 1]`. After a chunk that it does not
            end a network has no tokens and ends none.
        chunk: tokens that make a version, C.
        cap: the largest norm of F at a chunk's end.

    Returns:
        W1 and F after each chunk, `[K, N, rows, columns]`; W1, F and the total after all, as at the
        start. All are float32, as every float tensor given.

    Raises:
        ValueError: a shape, dtype or width does not fit, or the device is not supported.
    """
    check_device(k.device)
    check_scan(Scan(k, v, eta, first, last, total, rate, norm, closes, chunk, cap))
    return _Scan.apply(chunk, cap, closes, k, v, eta, first, last, total, rate, norm)  # type: ignore[return-value]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunk: int, cap: float, closes: Tensor, *tensors: Tensor | None):
        packed = [None if z is None else z.contiguous() for z in tensors]
        scan = Scan(*packed, closes.contiguous(), chunk, cap)  # type: ignore[arg-type]
        launch, made = scan_launch(scan)
        launch.run()
        ctx.chunk, ctx.cap = chunk, cap
        ctx.save_for_backward(scan.closes, made.firsts, made.lasts, *packed)
        end = None if made.firsts is None else made.firsts[-1].clone()
        return made.firsts, made.lasts, end, made.lasts[-1].clone(), made.total

    @staticmethod
    @first_order
    def backward(ctx: Any, *by_outputs: Tensor | None):  # type: ignore[override]
        closes, firsts, lasts, *tensors = ctx.saved_tensors
        k, v, eta, first, last, total, rate, norm = tensors
        scan = Scan(k, v, eta, first, last, total, rate, norm, closes, ctx.chunk, ctx.cap)
        by = By(*(None if z is None else z.contiguous() for z in by_outputs))  # type: ignore[arg-type]
        if scan.first is None:
            by = By(None, by.lasts, None, by.end_last, None)
        launches, found = back_launches(scan, Made(firsts, lasts, None), by)
        for launch in launches:
            launch.run()
        return None, None, None, *found.gradients()
