"""How the queries of a parallel call read virtual tokens: each the memory version of its moment.

A chunk of neighbouring queries meets at most two versions, so each group of C gets both and a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Gate
from .memory import VirtualTokens
from .span import Block, Span

if TYPE_CHECKING:
    from .cache import HierarchicalCache


def pairs(readouts: Tensor, span: Span) -> Tensor:
    """The two versions that each group of queries may meet: `[B, V, *]` -> `[B, 1, G, 2, *]`."""
    first = _current(span, span.tokens[:, :: span.window.chunk])  # [B|1, G]
    index = torch.stack([first, first + 1], dim=-1).clamp(max=readouts.shape[1] - 1)
    rows = torch.arange(readouts.shape[0], device=index.device)[:, None, None]
    return readouts[rows, index][:, None]


def _current(span: Span, tokens: Tensor) -> Tensor:
    """The version that tokens meet, counted from the one at the start of the call."""
    return span.window.version(tokens) - span.window.version(span.start)[:, None]


class Reading(nn.Module):
    """The gate and the reader of a cache as one module, for one block of queries at a time."""

    def __init__(self, cache: HierarchicalCache) -> None:
        super().__init__()
        assert isinstance(cache.reader, VirtualTokens) and cache.gate is not None
        self.reader: VirtualTokens = cache.reader
        self.gate: Gate = cache.gate
        self.written: Callable[[Tensor], Tensor] = cache.written

    def forward(
        self, q: Tensor, scores: Tensor, readout: Tensor, span: Span, block: Block
    ) -> tuple[Tensor, Tensor]:
        """Let a block of t queries share itself between the window and the memory.

        Args:
            q: before RoPE, `[B, Hkv, R, t, D]`.
            scores: over what is seen exactly, `[B, Hkv, R, t, L]`.
            readout: from `pairs`, of the block's groups.

        Returns:
            weights shaped as `scores`, and what the memory adds to the output,
            `[B, Hkv, R, t, D]`.
        """
        length, groups = q.shape[3], (readout.shape[2], span.window.chunk)
        readout = readout[:, 0]
        tokens = span.tokens[:, block.queries]
        written = self.written(tokens)
        current = _current(span, tokens)
        first = current[:, :: span.window.chunk].repeat_interleave(groups[1], dim=1)[:, :length]
        visible = torch.stack([current == first, current != first], dim=-1) & written[..., None]
        visible = visible.repeat_interleave(self.reader.slots, dim=-1)[:, None, None]
        missing = groups[0] * groups[1] - length
        virtual = self.reader.score(_longer(q, missing).unflatten(3, groups), readout)
        virtual = _longer(virtual.flatten(3, 4), -missing).masked_fill(~visible, float("-inf"))
        on_exact, on_virtual = self.gate(scores, virtual, written[:, None, None, :, None], q)
        on_virtual = _longer(on_virtual, missing).unflatten(3, groups)
        return on_exact, _longer(self.reader.mix(on_virtual, readout).flatten(3, 4), -missing)


def _longer(x: Tensor, rows: int) -> Tensor:
    """So many rows of zeros more, or rows less, before the last axis; no copy for none."""
    return F.pad(x, (0, 0, 0, rows)) if rows else x
