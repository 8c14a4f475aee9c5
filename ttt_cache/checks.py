"""Input is checked once, at the border; messages name argument, value and what is allowed."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .cache import HierarchicalCache
    from .state import CacheState


def whole_number(name: str, value: Any, minimum: int) -> int:
    """Check an integer setting and return it as an `int`.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is below `minimum`.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer of at least {minimum}, got {value!r}") from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Check a named choice; raises `ValueError` (unknown) or `TypeError` (not a string)."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def check_inputs(cache: HierarchicalCache, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> None:
    """Raise `TypeError` or `ValueError` unless all four are what the cache's sizes ask for."""
    given = {"q": q, "k": k, "v": v, "x": x}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {_kind(tensor)}")
    if q.dim() != 4 or q.shape[0] == 0 or q.shape[2] == 0:
        wanted = f"[B, {cache.num_heads}, T, {cache.head_dim}] with B and T at least 1"
        raise ValueError(f"q must have shape {wanted}, got {list(q.shape)}")
    batch, _, length, _ = q.shape
    key_shape = [batch, cache.kv_heads, length, cache.head_dim]
    expected = {
        "q": [batch, cache.num_heads, length, cache.head_dim],
        "k": key_shape,
        "v": key_shape,
        "x": [batch, length, cache.dim],
    }
    for name, shape in expected.items():
        if list(given[name].shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {list(given[name].shape)}")


def check_state(cache: HierarchicalCache, state: CacheState, batch: int) -> None:
    """Raise `TypeError` or `ValueError` unless the state was made for this cache and batch."""
    if not hasattr(state, "keys") or not isinstance(getattr(state, "features", None), Tensor):
        raise TypeError(f"state must be a CacheState from init_state, got {_kind(state)}")
    width = 0 if cache.memory is None else cache.memory.width
    expected = {
        "keys": [batch, cache.kv_heads, cache.window.capacity, cache.head_dim],
        "features": [batch, 1, cache.window.recent, width],
    }
    for name, shape in expected.items():
        if (got := list(getattr(state, name).shape)) != shape:
            raise ValueError(
                f"state must hold {name} of shape {shape}, got {got}: "
                "it was made for another batch size or another cache"
            )


def check_mask(mask: Tensor, state: CacheState) -> None:
    """Raise `TypeError` or `ValueError` unless the mask is one bool per row."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"exec_mask must be a bool tensor, got {_kind(mask)}")
    if mask.dtype != torch.bool or mask.shape != state.count.shape:
        raise ValueError(
            f"exec_mask must be bool of shape {list(state.count.shape)}, "
            f"got {mask.dtype} of shape {list(mask.shape)}"
        )


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else repr(value)
