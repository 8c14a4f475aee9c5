"""Weights that are trained are float32, whatever the model's dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ttt_cache.patch import Patch
from ttt_cache.targets import attention_of, projection_format


@contextmanager
def float32_adapter(handle: Patch) -> Iterator[None]:
    """Hold the caches' weights in float32 meanwhile: bfloat16 would round the updates away.

    Parameters keep their identity. Models of float64 stay as they are.
    """
    narrow = {
        layer: dtype
        for layer in handle.layers
        if (dtype := projection_format(attention_of(handle.transformer, layer))[1]).itemsize < 4
    }
    for layer in narrow:
        handle.caches[layer].float()
    try:
        yield
    finally:
        for layer, dtype in narrow.items():
            handle.caches[layer].to(dtype)
