"""What the tests of the evaluation share: a tiny testbed, and a recipe of a few steps."""

from __future__ import annotations

from typing import Any

import torch
from moshi.models.lm import LMModel
from torch import Tensor

from ttt_cache.evaluation.habits import Habits
from ttt_cache.evaluation.recipe import Course, Recipe
from ttt_cache.evaluation.source import TestbedSource
from ttt_cache.evaluation.subject import Subject
from ttt_cache.testbed.model import CONFIG
from ttt_cache.testbed.model import CONTEXT as TESTBED_CONTEXT

CONTEXT = 64
SETTINGS: dict[str, Any] = {
    "recent": 6,
    "chunk": 4,
    "virtual": 3,
    "memory_heads": 2,
    "memory_dim": 4,
    "hidden_dim": 8,
}


def tiny(seed: int = 0, **changes: Any) -> LMModel:
    """A testbed of random weights, in eval mode and frozen."""
    sizes = {"dim": 16, "num_heads": 2, "context": CONTEXT}
    sizes |= {"depformer_dim": 8, "depformer_dim_feedforward": 16, "depformer_num_heads": 1}
    torch.manual_seed(seed)
    return LMModel(**{**CONFIG, **sizes, **changes}).eval().requires_grad_(False)


def random_codes(lm: LMModel, frames: int, seed: int = 1) -> Tensor:
    """Codes that mean nothing, `[2, K, frames]`."""
    generator = torch.Generator().manual_seed(seed)
    cards = [lm.text_card, *[lm.card] * lm.n_q]
    drawn = [torch.randint(card, (2, 1, frames), generator=generator) for card in cards]
    return torch.cat(drawn, dim=1)


def subject(lm: LMModel | None = None, **changes: Any) -> Subject:
    """The tiny testbed with its conversations; not the shipped one, so nothing shipped is used."""
    given = {"source": TestbedSource("few"), "settings": SETTINGS, **changes}
    return Subject(tiny() if lm is None else lm, "tiny", **given)


def recipe(distill: int = 1, tune: int = 1, frames: int = 40, **changes: Any) -> Recipe:
    """Steps on sequences of some frames, both for a model of `CONTEXT`."""
    frames = frames * TESTBED_CONTEXT // CONTEXT
    courses = (Course(((frames, 2, steps),) if steps else (), lr=3e-3) for steps in (distill, tune))
    return Recipe(*courses, **changes)


def slow_loop(tokens: list[int], longest: int) -> tuple[int, int]:
    """Length and period of the longest loop, by trying all."""
    best = (0, 0)
    for period in range(1, longest + 1):
        for begin in range(len(tokens)):
            end = begin + period
            while end < len(tokens) and tokens[end] == tokens[end - period]:
                end += 1
            if end - begin >= 2 * period and end - begin > best[0]:
                best = (end - begin, period)
    return best


def habits_of(model: LMModel, codes: Tensor, window: int, piece: int) -> dict[str, Any]:
    """What windows of a run say, taken in piece by piece."""
    habits = Habits(model, codes.shape[0], codes.shape[2], window)
    for part in codes.split(piece, dim=2):
        habits.add(part)
    return habits.result()
