"""What computes the parallel form: plain PyTorch, or the kernels (`fused_parallel.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from . import windowed
from .memory import chunks
from .memory.chunks import Given, Versions
from .span import Span
from .windowed import Exact

if TYPE_CHECKING:
    from .cache import HierarchicalCache


@dataclass(frozen=True)
class Form:
    """One way to compute a call of many tokens.

    Attributes:
        attend: attention to window, sinks and virtual tokens, as `ttt_cache.windowed.attend`.
        turns_once: whether `attend` wants the keys of a call after RoPE.
        run: chunks through a network, as `ttt_cache.memory.chunks.run`.
        scans_again: whether the scan is made again with them, and none of them is kept.
    """

    attend: Callable[[HierarchicalCache, Exact, Tensor | None, Span], Tensor]
    turns_once: Callable[[HierarchicalCache], bool]
    run: Callable[[Given], Versions]
    scans_again: bool


PLAIN = Form(windowed.attend, windowed.turns_once, chunks.run, scans_again=False)
