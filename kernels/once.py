"""Backward passes that are written out by hand, and whose gradients nobody has written."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

Backward = Callable[..., Any]


def first_order(backward: Backward) -> Backward:
    """A backward pass that refuses to be differentiated.

    `once_differentiable` would not notice where a gradient of gradients goes by saved tensors.

    Raises:
        RuntimeError: it runs under `create_graph=True`.
    """

    @wraps(backward)
    def checked(ctx: Any, *by_outputs: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "gradients of gradients are not made for the cache: call backward or "
                "torch.autograd.grad with create_graph=False"
            )
        return backward(ctx, *by_outputs)

    return checked
