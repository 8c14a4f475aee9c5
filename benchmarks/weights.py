"""How large the fast weights of a streaming model are, beside what docs/semantics.md promises."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_cache.memory import TTT
from ttt_cache.patch import Patch
from ttt_cache.state import CacheState


def memories_of(handle: Patch) -> list[TTT]:
    memories = [cache.memory for cache in handle.caches.values()]
    return [memory for memory in memories if isinstance(memory, TTT)]


class Watch:
    """The largest fast weights of any head of any layer, over all looks.

    Figures: `|F|` of the last layer F, the longest column of the layers before it beside its
    start, and the norm of the gradient so far; 0 where there are no such layers.
    """

    NAMES = ("last", "column", "grad")

    def __init__(self, handle: Patch, states: list[CacheState]) -> None:
        memories = memories_of(handle)
        self.fast, self.states = memories[0].fast, [state.memory for state in states]
        self.starts = {
            name: torch.stack([getattr(m.fast, name) for m in memories])[:, None].double()
            for name in self.fast.hidden
        }
        self.peak = torch.zeros(len(self.NAMES), dtype=torch.float64)
        self.now = self.peak

    def look(self) -> None:
        """To be called after every step: a look at chunk ends would see capped weights only."""
        columns, gradients = [torch.zeros(1)], [torch.zeros(1)]
        for name, start in self.starts.items():
            columns.append((self._all(name).norm(dim=-2) / start.norm(dim=-2)).flatten())
            gradients.append(self._all(name.replace("w", "grad")).norm(dim=(-1, -2)).flatten())
        last = self._all(self.fast.last).norm(dim=(-1, -2))
        self.now = torch.stack([last.max(), torch.cat(columns).max(), torch.cat(gradients).max()])
        self.peak = torch.maximum(self.peak, self.now)  # NaN stays

    def _all(self, name: str) -> Tensor:
        return torch.stack([state[name] for state in self.states]).double()  # [layers, B, h, *, *]


def last_layer_bound(handle: Patch) -> float:
    """The bound of docs/semantics.md: max(sqrt(m d), |F at version 0|) + C sqrt(d)."""
    starts = [getattr(memory.fast, memory.fast.last) for memory in memories_of(handle)]
    rows, width = starts[0].shape[1:]
    first = max(float(start.norm(dim=(-1, -2)).max()) for start in starts)
    return max((rows * width) ** 0.5, first) + handle.config.chunk * width**0.5
