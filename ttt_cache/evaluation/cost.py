"""What a conversation costs: the bytes that it holds, and the time of a frame."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from moshi.models.lm import LMModel
from torch import Tensor

from ttt_cache.checks import whole_number

from .generation import generate, milliseconds

WARM = 32  # steps that are not timed: caches, allocators, the capture of CUDA graphs


def cost(lm: LMModel, *, rows: int = 1, frames: int = 500, seed: int = 0) -> dict[str, Any]:
    """Measure a model as it is, patched or not, through LMGen, on random codes.

    A step takes as long at the start of a conversation as at any time later: rings are as large
    when they are empty. Times of two models that are measured one after the other differ by what
    else the machine does; `benchmarks/step_time.py` interleaves them.

    Args:
        lm: in eval mode, not streaming.
        rows: conversations at once.
        frames: steps that are timed.
        seed: of codes and sampling.

    Returns:
        JSON-able: `state_bytes` of the temporal transformer, all rows; `step_ms` of whole frames,
        with `p50` and `p99`; `rows`, `frames`, `device` and CPU `threads`.

    Raises:
        TypeError, ValueError: a number is out of range, or the model is in training mode.
        RuntimeError: the model is streaming.
    """
    whole_number("rows", rows, 1)
    whole_number("frames", frames, 1)
    _, measured = generate(lm, _random(lm, rows, frames, seed), rows, seed)
    return {
        "rows": rows,
        "frames": frames,
        "device": str(lm.device),
        "threads": torch.get_num_threads(),
        "state_bytes": measured.state_bytes,
        "step_ms": milliseconds(measured.seconds),
    }


def _random(lm: LMModel, rows: int, frames: int, seed: int) -> Iterator[Tensor]:
    """Codes of a user: a piece to warm up with, and one to measure."""
    generator = torch.Generator().manual_seed(seed)
    for length in (WARM, frames):
        shape = rows, lm.n_q - lm.dep_q, length
        yield torch.randint(lm.card, shape, generator=generator)
