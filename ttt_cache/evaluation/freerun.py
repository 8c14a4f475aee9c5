"""Moshi speaks for as long as wanted, beside the user's side of a conversation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
from moshi.models.lm import LMModel
from torch import Tensor

from ttt_cache.checks import whole_number

from .collapse import collapse
from .generation import generate, milliseconds
from .habits import Habits, divergence, drift

if TYPE_CHECKING:
    from .source import Conversations

__all__ = ["collapse", "divergence", "drift", "freerun", "require_user"]

WINDOW = 1000  # frames: 80 seconds


def freerun(
    lm: LMModel,
    source: Conversations,
    frames: int,
    seed: int = 0,
    *,
    rows: int = 1,
    window: int = WINDOW,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Let a model answer a user for many frames, sampling, and look at what it says.

    The model hears the user of one of the source's conversations, whatever it answers, and itself.
    What Moshi says in the recorded conversation is looked at in the same way, as a standard that
    no model made. Memory does not grow with the conversation but for eight bytes a frame and one
    entry a window.

    Args:
        lm: stock, patched or partly patched; in eval mode, not streaming.
        source: of conversations with a user (`n_q > dep_q`).
        frames: length of each conversation.
        seed: of the conversations and of what is sampled.
        rows: conversations at once.
        window: frames that are looked at together.
        settings: of LMGen; `{"use_sampling": False}` is greedy. Its own defaults otherwise.

    Returns:
        JSON-able: `windows` and `histograms` (see `Habits`) of what the model says, `recorded` with
        the same of the recording, `state_bytes` of the temporal transformer after the first piece
        (`start`), at its largest (`most`) and at the `end`, `step_ms` with `p50` and `p99`
        of all steps, and what was asked for. `divergence`, `drift` and `collapse` compare.

    Raises:
        TypeError, ValueError: an argument is out of range, the model is in training mode or hears
            no user, or the source ends too early.
        RuntimeError: the model is streaming.
    """
    whole_number("frames", frames, 1)
    whole_number("rows", rows, 1)
    whole_number("window", window, 1)
    require_user(lm)
    said, recorded = (Habits(lm, rows, frames, window) for _ in range(2))
    steps = frames + max(lm.delays)  # a frame is whole when its last codebook is

    def heard() -> Iterator[Tensor]:
        for piece in source.pieces(rows, steps, seed):
            recorded.add(piece.codes[:, : 1 + lm.dep_q])
            yield piece.codes[:, 1 + lm.dep_q :]

    seconds, held, done = [], [], 0
    with closing(generate(lm, heard(), rows, seed, settings)) as pieces:
        for generated in pieces:
            said.add(generated.codes)
            seconds.append(generated.seconds)
            held.append(generated.state_bytes)
            done += generated.codes.shape[2]
    if done < frames:
        raise ValueError(f"{source.name} must have {steps} frames for a run of {frames}, it ended")
    return {
        "frames": frames,
        "rows": rows,
        "window": window,
        "seed": seed,
        **said.result(),
        "recorded": recorded.result(),
        "state_bytes": {"start": held[0], "most": max(held), "end": held[-1]},
        "step_ms": milliseconds(np.concatenate(seconds)),
    }


def require_user(lm: LMModel) -> None:
    """Raise `ValueError` if a model hears nobody, so that it cannot speak beside a user."""
    if lm.n_q == lm.dep_q:
        raise ValueError(
            f"the model has one voice, n_q = dep_q = {lm.n_q}: to speak for itself it must hear a "
            "user, as Moshi does"
        )
