"""A loss or a gradient that is no number: the run stops before it reaches the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from . import checkpoint
from .settings import Settings


class NotFiniteError(RuntimeError):
    """A loss or a gradient is not finite, on every process alike."""


def check_finite(
    figures: Mapping[str, float], settings: Settings, index: int, steps_before: int
) -> None:
    """Refuse a step.

    Args:
        figures: its losses and the like.
        index: its stage.
        steps_before: in all stages.

    Raises:
        NotFiniteError: one is not finite; the message says what helps.
    """
    for name, figure in figures.items():
        if not math.isfinite(figure):
            raise NotFiniteError(
                f"step {steps_before + 1}: {name} is {figure}; "
                f"{_way_out(settings, index, steps_before)}"
            )


def _way_out(settings: Settings, index: int, steps_before: int) -> str:
    """The same command would meet the same step, and with other settings it is another run."""
    stage = settings.ttt_cache.stages[index]
    rate = "optim.lr" if stage.lr is None else f"ttt_cache.stages.{index}.lr"
    lower = f"a lower {rate} or max_norm may help"
    if not steps_before or not settings.do_ckpt:
        return f"{lower}, in another run_dir or with overwrite_run_dir: true"
    folder = checkpoint.folder_of(Path(settings.run_dir), steps_before)
    widened = stage.train in ("layers", "everything")
    lacks = " (the memory alone, not what was trained of Moshi)" if widened else ""
    return (
        f"the steps before it are saved in {folder}, but the same command would meet it again: "
        f"{lower}, in another run_dir with ttt_cache.adapter: {folder / checkpoint.ADAPTER} in "
        f"place of ttt_cache.patch{lacks}"
    )
