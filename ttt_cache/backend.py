"""Which code computes: chosen once, when a state is made or a call of many tokens begins.

`TTT_CACHE_BACKEND` is `auto` (the default), `reference` (plain PyTorch) or `triton`, which is
refused where it cannot be had. Nothing ever falls back to anything else. The kernels were
proven in Triton's interpreter and compiled, but have not run on a GPU yet: so `auto` is plain
PyTorch for now, and who has a GPU asks for them by name.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

import torch
from moshi.modules.rope import RotaryEmbedding

from .checks import one_of
from .form import PLAIN, Form
from .memory import TTT
from .memory.tokens import LatentTokens

if TYPE_CHECKING:
    from .cache import HierarchicalCache
    from .fused import Fused
    from .state import CacheState

VARIABLE = "TTT_CACHE_BACKEND"
BACKENDS = ("auto", "reference", "triton")


class Backend(NamedTuple):
    """What was chosen and why.

    Attributes:
        fused: runs the kernels of streaming steps; `None` where they do not run.
        form: what calls of several tokens are computed by.
    """

    name: str
    reason: str
    fused: Fused | None = None
    form: Form = PLAIN

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


REFERENCE = Backend("reference", "no other was chosen")


def choose(cache: HierarchicalCache, state: CacheState) -> Backend:
    """The backend for a new state of the cache.

    Raises:
        ValueError: `TTT_CACHE_BACKEND` is none, or names one that cannot be had here.
    """
    return _chosen(cache, state.keys.device, state)


def parallel_form(cache: HierarchicalCache, device: torch.device) -> Form:
    """What computes a call of the parallel form, for which no state need be there.

    Raises:
        ValueError: as `choose`.
    """
    return _chosen(cache, device, None).form


def _chosen(cache: HierarchicalCache, device: torch.device, state: CacheState | None) -> Backend:
    wanted = one_of(VARIABLE, os.environ.get(VARIABLE) or "auto", BACKENDS)
    if device.type == "meta":
        return Backend("reference", "nothing is computed on the device meta")
    if wanted != "triton":
        return Backend("reference", f"{VARIABLE}={wanted}")
    against = _not_among_kernels(cache)
    if against is None:
        try:
            return Backend("triton", f"{VARIABLE}=triton", *_kernels(cache, device, state))
        except (ImportError, ValueError) as error:
            against = str(error)
    raise ValueError(f"{VARIABLE}=triton cannot be had: {against}")


def _not_among_kernels(cache: HierarchicalCache) -> str | None:
    """What of a configuration there are no kernels for."""
    config, memory = cache.config, cache.memory
    if memory is not None and not isinstance(memory, TTT):
        return f"there are kernels for ttt-mlp, ttt-linear and none, not for {config.memory!r}"
    if memory is not None and not isinstance(cache.reader, LatentTokens):
        return f"there are kernels for read='virtual', not for {config.read!r}"
    if memory is not None and config.source == "output":
        return "there are kernels for the sources hidden and kv, not for 'output'"
    if memory is not None and len(memory.fast.hidden) > 1:
        return f"there are kernels for depth=2, not for {config.depth}"
    if cache.rope is not None and type(cache.rope) is not RotaryEmbedding:
        return f"there are kernels for Moshi's RotaryEmbedding, not for {cache.rope!r}"
    return None


def _kernels(
    cache: HierarchicalCache, device: torch.device, state: CacheState | None
) -> tuple[Fused | None, Form]:
    """Kernels for a state and for calls; raises `ImportError` or `ValueError` if there are none."""
    from .kernels.checks import check_device

    check_device(device)  # an old Triton lacks what the others import
    from . import fused, fused_parallel

    fused_parallel.check_sizes(cache)
    made = None
    if state is not None:
        made = fused.Fused.of(cache, state)
        fused.rehearse(cache, state, made)
    return made, fused_parallel.KERNELS
