"""The memory learns to last: conversations that go on from step to step, its state carried along.

A memory that was never older than a training sequence may fade afterwards: its weights walk on to
where nothing taught it to read them. Here it meets states of any age. Half of the rows begin anew
in every step, so that the memory does not unlearn how conversations begin. Its teacher is stock
Moshi, whose ring is carried along too, so that it is never beyond the length that it was trained
on.
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Iterator
from typing import NamedTuple

import torch
from moshi.models.lm import LMModel
from torch import Tensor

from ttt_cache.memory import TTT
from ttt_cache.patch import Patch
from ttt_cache.training.carry import Carry, full_context
from ttt_cache.training.data import LMFacts
from ttt_cache.training.loss import predict

from .delays import Delays
from .recipe import Recipe
from .source import Source
from .tune import loss_beside


class Part(NamedTuple):
    """The next frames of one conversation, codes `[1, K, T]`; `fresh`: its first."""

    codes: Tensor
    fresh: bool


@torch.no_grad()
def slow_down(handle: Patch, factor: float) -> None:
    """Divide the inner learning rates of all layers before the last one, of a network that learns.

    They are `sigmoid(step_size)`, see `ttt_cache.memory.network.FastWeights`.
    """
    for memory in {cache.memory for cache in handle.caches.values()}:  # layers may share one
        if isinstance(memory, TTT) and memory.fast.hidden:
            size = memory.fast.step_size
            size.copy_(torch.logit(torch.sigmoid(size) / factor))


def lasting(
    lm: LMModel, handle: Patch, source: Source, recipe: Recipe, seed: int
) -> Generator[Tensor]:
    """The loss of every step of `recipe.last`, a scalar; go backward before you take the next."""
    device = next(lm.parameters()).device
    for stage, (frames, rows, steps) in enumerate(recipe.last.stages):
        longest = [1] * (rows // 2) + [recipe.longest] * (rows - rows // 2)
        talks = [
            conversations(source, frames, most, f"{seed}, stage {stage}, row {row}")
            for row, most in enumerate(longest)
        ]
        mine, stock = Carry(handle), Carry(handle, full_context(handle))
        delays = Delays(LMFacts.of(lm), rows, device)
        for _ in range(steps):
            parts = [next(talk) for talk in talks]
            fresh = torch.tensor([part.fresh for part in parts], device=device)
            delayed = delays.take(torch.cat([part.codes for part in parts]), fresh)
            with torch.no_grad(), stock.segment(fresh):
                taught = predict(lm, delayed)
            with mine.segment(fresh):
                yield loss_beside(lm, delayed, taught, recipe)


def conversations(source: Source, frames: int, longest: int, seed: str) -> Iterator[Part]:
    """One conversation after another, `frames` frames at a time: of 1 to `longest` parts, as many
    of them between 1 and 2 parts as between 2 and 4. None is longer than the source has them."""
    if source.longest is not None:
        longest = max(1, min(longest, source.longest // frames))
    rng = random.Random(seed)
    while True:
        parts = int(2 ** rng.uniform(0, math.log2(longest)))
        (codes,) = source.batches(1, parts * frames, 1, rng.getrandbits(48))
        for number, part in enumerate(codes.split(frames, dim=2)):
            yield Part(part, number == 0)
