"""Attention over a long sequence, block by block of queries, in memory linear in its length.

Nothing of a block outlives it: the backward pass makes it again, as FlashAttention does
(arXiv 2205.14135). Blocks are small, so that what they make stays in a processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .span import Block

Cut = tuple[Block, tuple[slice | None, ...]]
"""A block, and what it takes of each tensor: a part of its third axis, or all of it (`None`)."""


def blockwise(attend: Callable[..., Tensor], cuts: list[Cut], *tensors: Tensor) -> Tensor:
    """The outputs of all blocks, `[B, H, T, D]`, differentiable by every tensor.

    Args:
        attend: `attend(block, *parts)` makes the output of a block, `[B, H, t, D]`. Gradients reach
            nothing but the parts.
        cuts: one for each block.
        tensors: the first one is `[B, H, T, D]` and cut into the queries of the blocks.
    """
    output = _Blockwise.apply(attend, cuts, *tensors)
    assert output is not None
    return output


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, attend: Callable[..., Tensor], cuts: list[Cut], *tensors: Tensor
    ) -> Tensor:
        ctx.attend, ctx.cuts, ctx.autocast = attend, cuts, _autocast(tensors[0].device.type)
        ctx.save_for_backward(*tensors)
        rows, heads, length, width = tensors[0].shape
        # The heads of a token stand side by side, as the projection after the attention wants them.
        output = tensors[0].new_empty(rows, length, heads, width).transpose(1, 2)
        for block, parts in cuts:
            output[:, :, block.queries] = attend(block, *_take(tensors, parts))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[2:]
        pairs = zip(tensors, wanted, strict=True)
        sums = [torch.zeros_like(tensor) if want else None for tensor, want in pairs]
        for block, parts in ctx.cuts:
            leaves = [part.detach() for part in _take(tensors, parts)]
            for leaf, want in zip(leaves, wanted, strict=True):
                leaf.requires_grad_(want)
            with torch.enable_grad(), ctx.autocast():
                output = ctx.attend(block, *leaves)
            inputs = [leaf for leaf in leaves if leaf.requires_grad]
            found = torch.autograd.grad(
                output, inputs, gradient[:, :, block.queries], allow_unused=True
            )
            pieces = iter(found)
            for total, part in zip(sums, parts, strict=True):
                if total is not None and (piece := next(pieces)) is not None:
                    (total if part is None else total[:, :, part]).add_(piece)
        return None, None, *sums


def _take(tensors: Iterable[Tensor], parts: Iterable[slice | None]) -> list[Tensor]:
    pairs = zip(tensors, parts, strict=True)
    return [tensor if part is None else tensor[:, :, part] for tensor, part in pairs]


def _autocast(device_type: str) -> Callable[[], AbstractContextManager]:
    """What makes the autocast of now, at another time."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled)
