"""Attention over a long sequence, block by block of queries or of heads.

Nothing of a block outlives it: the backward pass makes it again, as FlashAttention does
(arXiv 2205.14135).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .kernels.once import first_order
from .product import differentiated_only

Part = tuple[slice, ...]
Cut = tuple[Any, tuple[Part, ...]]
"""What a block is told, and which part of each tensor it takes."""

WHOLE: Part = ()


def tokens(some: slice) -> Part:
    """Some of the third axis."""
    return (slice(None), slice(None), some)


def heads(some: slice) -> Part:
    """Some of the second axis."""
    return (slice(None), some)


def blockwise(attend: Callable[..., Tensor], cuts: list[Cut], *tensors: Tensor) -> Tensor:
    """The outputs of all blocks, `[B, H, T, D]`, differentiable by every tensor.

    Args:
        attend: `attend(told, *parts)` makes the output of a block, which stands where its queries
            do. Gradients reach nothing but the parts.
        cuts: one for each block.
        tensors: the first three are queries `[B, H, T, D]`, keys and values `[B, Hkv, T, D]`, of
            one dtype. Gradients by them lie side by side, `[B, T, H + 2 Hkv, D]`.
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
        for told, parts in cuts:
            output[parts[0]] = attend(told, *_take(tensors, parts))
        return output

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[2:]
        sums = _sums(tensors, wanted)

        # A function, so that nothing of a block is left when the next one is made.
        def add(told: Any, parts: tuple[Part, ...]) -> None:
            pairs = zip(_take(tensors, parts), wanted, strict=True)
            leaves = [part.detach().requires_grad_(want) for part, want in pairs]
            with torch.enable_grad(), ctx.autocast(), differentiated_only():
                output = ctx.attend(told, *leaves)
            if not output.requires_grad:  # nothing wanted has part in it
                return
            inputs = [leaf for leaf in leaves if leaf.requires_grad]
            found = torch.autograd.grad(output, inputs, gradient[parts[0]], allow_unused=True)
            pieces = iter(found)
            for total, part in zip(sums, parts, strict=True):
                if total is not None and (piece := next(pieces)) is not None:
                    total[part].add_(piece)

        for told, parts in ctx.cuts:
            add(told, parts)
        return None, None, *sums


def _sums(tensors: tuple[Tensor, ...], wanted: tuple[bool, ...]) -> list[Tensor | None]:
    """Zeros for every gradient."""
    (rows, _, length, width), heads = tensors[0].shape, [z.shape[1] for z in tensors[:3]]
    packed = tensors[0].new_zeros(rows, length, sum(heads), width).transpose(1, 2)
    begun = zip(packed.split(heads, dim=1), wanted[:3], strict=True)
    rest = zip(tensors[3:], wanted[3:], strict=True)
    return [
        *(total if want else None for total, want in begun),
        *(torch.zeros_like(tensor) if want else None for tensor, want in rest),
    ]


def _take(tensors: Iterable[Tensor], parts: Iterable[Part]) -> list[Tensor]:
    return [tensor[part] for tensor, part in zip(tensors, parts, strict=True)]


def _autocast(device_type: str) -> Callable[[], AbstractContextManager]:
    """What makes the autocast of now, at another time."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled)
