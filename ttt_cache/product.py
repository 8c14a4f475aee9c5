"""The last product of a block of queries, which need not be made to be differentiated.

A block of `ttt_cache.blocks` is made again only for the gradients of its output, and a product's
gradients need its factors alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

_UNMADE = ContextVar("_UNMADE", default=False)


@contextmanager
def differentiated_only() -> Iterator[None]:
    """Within it last products hold no values, only their gradients are right."""
    token = _UNMADE.set(True)
    try:
        yield
    finally:
        _UNMADE.reset(token)


def last_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, of matrices with the same axes before them, on which nothing nonlinear follows."""
    if not _UNMADE.get():
        return a @ b
    kind = a.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        a, b = a.to(dtype), b.to(dtype)
    product = _Unmade.apply(a, b)
    assert product is not None
    return product


class _Unmade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a.new_zeros(()).expand(*a.shape[:-1], b.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        return gradient @ b.transpose(-1, -2), a.transpose(-1, -2) @ gradient
