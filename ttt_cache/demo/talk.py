"""All models hear the same conversations, in turns, and answer by Moshi's own generator."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from moshi.utils.compile import no_compile
from torch import Tensor
from torch.nn import functional as F

from ttt_cache.evaluation.generation import Generated, generate

from .arms import Arm

TURN = 25  # frames that one model hears before the next one has its turn


@dataclass
class Talk:
    """What came of one model.

    Attributes:
        said: Moshi's text token in every frame, int64 `[B, T]`.
        seconds: of every step, of all conversations together, `[T]`.
        state_bytes: of one conversation, after every turn.
    """

    said: Tensor
    seconds: np.ndarray
    state_bytes: list[int]


def hold(
    arms: Sequence[Arm], heard: Tensor, on_frames: Callable[[int], None] = lambda done: None
) -> list[Talk]:
    """Step every model through the conversations; each says what it finds most likely.

    Args:
        heard: the user's codes, int64 `[B, 2, T]`.
        on_frames: called with the number of frames that all models have heard.
    """
    rows, _, frames = heard.shape
    # The generator gives a frame when its delayed codebooks are there.
    turns = F.pad(heard, (0, max(arms[0].lm.delays))).split(TURN, dim=2)
    talks: list[list[Generated]] = [[] for _ in arms]
    with ExitStack() as stack:
        # Around all generators, which leave such modes as they found them, but not in order.
        stack.enter_context(torch.no_grad())
        stack.enter_context(no_compile())
        runs = [generate(arm.lm, turns, rows, 0, {"use_sampling": False}) for arm in arms]
        for run in runs:
            stack.enter_context(closing(cast("Generator[Generated]", run)))
        for number, results in enumerate(zip(*runs, strict=True)):
            for talk, result in zip(talks, results, strict=True):
                talk.append(result)
            on_frames(min((number + 1) * TURN, frames))
    return [_joined(talk, rows) for talk in talks]


def _joined(results: Sequence[Generated], rows: int) -> Talk:
    return Talk(
        said=torch.cat([result.codes[:, 0] for result in results], dim=1),
        seconds=np.concatenate([result.seconds for result in results]),
        state_bytes=[result.state_bytes // rows for result in results],
    )


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Run torch on a fixed number of CPU threads, so that step times can be compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
