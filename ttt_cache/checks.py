"""Input is checked once, at the border; messages name argument, value and what is allowed."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .cache import HierarchicalCache
    from .state import CacheState

LARGEST_SEED = 2**32 - 1


def whole_number(name: str, value: Any, minimum: int | None = None) -> int:
    """Check an integer setting and return it as an `int`.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is below `minimum`.
    """
    least = "" if minimum is None else f" of at least {minimum}"
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer{least}, got {value!r}") from None
    if minimum is not None and number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def between(name: str, value: Any, least: int, most: int) -> int:
    """Check an integer setting in [least, most]; raises `TypeError` or `ValueError`."""
    number = whole_number(name, value, least)
    if number > most:
        raise ValueError(f"{name} must be at most {most}, got {number}")
    return number


def seed_of(name: str, value: Any) -> int:
    """Check a seed, one that every generator takes; raises `TypeError` or `ValueError`."""
    return between(name, value, 0, LARGEST_SEED)


def threads_here(name: str, value: Any) -> int:
    """Check a number of CPU threads, at most this machine's; raises `TypeError`, `ValueError`."""
    return between(name, value, 1, os.cpu_count() or 1)


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """Check a named choice; raises `ValueError` (unknown) or `TypeError` (not a string)."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def device_here(name: str, value: str) -> str:
    """Check the name of a device; raises `ValueError`, naming those of this machine."""
    numbered = (f"cuda:{index}" for index in range(torch.cuda.device_count()))
    there = ["cpu", *(["cuda"] if torch.cuda.device_count() else []), *numbered]
    if value not in there:
        raise ValueError(f"{name} must be one of {', '.join(there)} on this machine, got {value!r}")
    return value


def true_or_false(name: str, value: Any) -> bool:
    """Check a switch; raises `TypeError` if it is not a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def real_number(name: str, value: Any, least: float = 0.0, most: float = math.inf) -> float:
    """Check a real setting in [least, most]; raises `TypeError` or `ValueError`."""
    allowed = f"in [{least:g}, {most:g}]" if most < math.inf else f"of at least {least:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number {allowed}, got {value!r}")
    number = float(value)
    if not (least <= number <= most and math.isfinite(number)):
        raise ValueError(f"{name} must be a number {allowed}, got {value}")
    return number


def layer_indices(value: Any) -> tuple[int, ...] | None:
    """Check which layers are named, and that each is named once; `None` means all."""
    if value is None:
        return None
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"layers must be an iterable of layer indices or None (all), got {value!r}")
    layers = tuple(whole_number("layers", layer) for layer in value)
    if not layers:
        raise ValueError("layers must name at least one layer, got none; None means all")
    repeated = sorted({layer for layer in layers if layers.count(layer) > 1})
    if repeated:
        raise ValueError(f"layers must name each layer once, got {repeated[0]} more than once")
    return layers


def per_layer(name: str, value: Any, check: Callable[[str, Any], Any]) -> Any:
    """Check a setting, or each value of a mapping from layer to one; keys may be JSON's strings."""
    if not isinstance(value, Mapping):
        return check(name, value)
    if not value:
        raise ValueError(f"{name} must be a value or map each patched layer to one, got {{}}")
    checked = {}
    for key, item in value.items():
        is_json = isinstance(key, str) and key.lstrip("-").isdigit()
        layer = whole_number(f"{name} keys", int(key) if is_json else key)
        if layer in checked:
            raise ValueError(f"{name} must name each layer once, got {layer} more than once")
        checked[layer] = check(f"{name}[{layer}]", item)
    return checked


def check_inputs(cache: HierarchicalCache, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> None:
    """Raise `TypeError` or `ValueError` unless all four are what the cache's sizes ask for."""
    given = {"q": q, "k": k, "v": v, "x": x}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {_kind(tensor)}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must be of one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
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


def check_state(cache: HierarchicalCache, state: CacheState, q: Tensor) -> None:
    """Raise `TypeError` or `ValueError` unless the state was made for this cache and batch."""
    if not hasattr(state, "readout"):
        raise TypeError(f"state must be a CacheState from init_state, got {_kind(state)}")
    shapes = {name: tensor.shape for name, tensor in state.tensors()}
    for name in shapes.keys() | cache.layout.keys():
        wanted = torch.Size((q.shape[0], *cache.layout[name])) if name in cache.layout else None
        if shapes.get(name) != wanted:
            got = _sizes(shapes.get(name))
            raise ValueError(
                f"state must hold {name} of shape {_sizes(wanted)}, got {got}: "
                "it was made for another batch size or another cache"
            )
    if state.count.device != q.device:
        where = state.count.device
        raise ValueError(f"q, k, v and x must be on {where} as the state is, got {q.device}")
    if state.keys.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type):
        raise TypeError(f"q, k and v must be {state.keys.dtype} as the state is, got {q.dtype}")


def check_mask(name: str, mask: Tensor, count: Tensor) -> None:
    """Raise `TypeError` or `ValueError` unless the mask is a bool beside each row's count."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {_kind(mask)}")
    if mask.shape != count.shape:
        raise ValueError(f"{name} must have shape {list(count.shape)}, got {list(mask.shape)}")
    if mask.device != count.device:
        raise ValueError(f"{name} must be on {count.device} as the state is, got {mask.device}")


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else repr(value)


def _sizes(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(list(shape))
