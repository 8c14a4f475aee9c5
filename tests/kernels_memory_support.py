"""What the tests of the memory kernel share: sizes, arms to compare, tensors of the cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from kernels_support import assert_accurate, poisoned
from torch import Tensor

from ttt_cache import CacheState
from ttt_cache.kernels import memory_reference as reference
from ttt_cache.kernels.memory_reference import MemoryRows, MemoryWeights
from ttt_cache.kernels.memory_step import memory_step
from ttt_cache.memory import TTT


@dataclass(frozen=True)
class Case:
    """Sizes of a memory, and how many steps it makes."""

    heads: int = 2
    d: int = 32
    n: int = 32  # 0 for a linear memory
    slots: int = 3
    wait: int = 2
    chunk: int = 3
    dtype: torch.dtype = torch.float32
    kept: torch.dtype | None = None  # of what waits, if not the same
    batch: int = 3
    steps: int = 9
    loud: bool = False  # F is beyond its cap where a chunk ends

    def weights(self) -> MemoryWeights:
        h, d, n = self.heads, self.d, self.n
        last = torch.randn(h, n or d, d) * (2 if self.loud else 0.1)
        first = torch.randn(h, d, n) if n else None
        rate, slots = torch.randn(h).to(self.dtype), torch.randn(h, self.slots, d).to(self.dtype)
        return MemoryWeights(rate, slots, first, last, torch.randn(1, h) if n else None)

    def rows(self) -> MemoryRows:
        """Rows that have not begun. All but what waits is NaN: nobody may look at it."""
        h, d, n = self.heads, self.d, self.n
        kept = self.kept or self.dtype
        waiting = torch.zeros(self.batch, 1, self.wait, h * (2 * d + 1), dtype=kept)
        first, gradient = (poisoned(self.batch, h, d, n) if n else None for _ in range(2))
        readout = poisoned(self.batch, self.slots, h * d)
        return MemoryRows(waiting, first, gradient, poisoned(self.batch, h, n or d, d), readout)

    def tokens(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and exec masks of all steps; rows fall out of step with each other."""
        width = self.heads * (2 * self.d + 1)
        for _ in range(self.steps):
            features = torch.randn(self.batch, width + 3).to(self.dtype)[:, :width]
            yield features, torch.rand(self.batch) < 0.8


class Arms:
    """The kernel beside its reference in the same dtype and in float64, each with its own state."""

    def __init__(self, case: Case) -> None:
        self.chunk = case.chunk
        self.count = torch.zeros(case.batch, dtype=torch.long)
        weights, rows = case.weights(), case.rows()
        self.weights, self.exact_weights = weights, MemoryWeights(*map(_double, weights))
        self.kernel, self.plain = rows, MemoryRows(*map(_copy, rows))
        self.exact = MemoryRows(_copy(rows.waiting), *map(_double, rows[1:]))

    def step(self, features: Tensor, mask: Tensor) -> float:
        """Make a step in all arms; the largest error as a share of what is allowed."""
        before = [_copy(tensor) for tensor in self.kernel]
        memory_step(features, self.count, mask, self.weights, self.kernel, self.chunk)
        with torch.no_grad():
            rest = (self.exact_weights, self.exact, self.chunk)
            reference.memory_step(features, self.count, mask, *rest)
            rest = (self.weights, self.plain, self.chunk)
            reference.memory_step(features, self.count, mask, *rest)
        self.count += mask
        self._assert_still(before, ~mask)
        assert torch.equal(_bits(self.kernel.waiting), _bits(self.exact.waiting))
        return max(self._compare(name) for name in MemoryRows._fields[1:])

    def reset(self, row: int) -> None:
        """Erase a row, as a state of the cache does."""
        self.count[row] = 0
        for tensor in (*self.kernel, *self.plain, *self.exact):
            if tensor is not None:
                tensor[row] = 0

    def _assert_still(self, before: list[Tensor | None], still: Tensor) -> None:
        for old, new in zip(before, self.kernel, strict=True):
            if old is not None and new is not None:
                assert torch.equal(_bits(old[still]), _bits(new[still]))

    def _compare(self, name: str) -> float:
        actual, exact, plain = (getattr(arm, name) for arm in (self.kernel, self.exact, self.plain))
        if actual is None:
            return 0.0
        known = ~exact.isnan()
        assert torch.equal(known, ~actual.isnan()), f"{name}: NaN where there should be none"
        if not known.any():
            return 0.0
        return assert_accurate(actual[known], exact[known], plain[known])


def weights_of(memory: TTT) -> MemoryWeights:
    fast = {name: weight.detach() for name, weight in memory.fast.layers.items()}
    first, last = (fast["w1"], fast["w2"]) if memory.fast.hidden else (None, fast["w1"])
    step_size = memory.fast.step_size.detach() if memory.fast.hidden else None
    return MemoryWeights(memory.rate.detach(), memory.slot_query.detach(), first, last, step_size)


def rows_of(state: CacheState) -> MemoryRows:
    held = state.memory
    last = held["w2"] if "w2" in held else held["w1"]
    first = held["w1"] if "w2" in held else None
    return MemoryRows(state.features, first, held.get("grad1"), last, state.readout)


def _double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _bits(tensor: Tensor) -> Tensor:
    """Bytes: NaN equals NaN of the same bits."""
    return tensor.contiguous().view(torch.uint8)
