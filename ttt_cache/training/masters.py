"""Weights that are trained are float32, whatever the model's dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ttt_cache.patch import Patch
from ttt_cache.targets import attention_of, projection_format


def widen(handle: Patch) -> None:
    """Make the caches' weights float32: bfloat16 would round the updates away.

    Parameters keep their identity. Those of float64 stay as they are.
    """
    for cache in handle.caches.values():
        if cache.anchor.dtype.itemsize < 4:
            cache.float()


@contextmanager
def float32_adapter(handle: Patch) -> Iterator[None]:
    """Within it the caches' weights are float32; then they have the model's dtype."""
    widen(handle)
    try:
        yield
    finally:
        for layer, cache in handle.caches.items():
            cache.to(projection_format(attention_of(handle.transformer, layer))[1])
