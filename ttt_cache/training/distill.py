"""Stage 0: the memory learns, layer by layer, to answer as full context would have."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from moshi.models.lm import LMModel
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ttt_cache.checks import real_number, true_or_false, whole_number
from ttt_cache.patch import Patch, require_patch

from .lesson import lesson
from .masters import float32_adapter
from .schedule import optimizer_for


@dataclass(frozen=True)
class Distilled:
    """What distillation did.

    Attributes:
        errors: by layer, the relative squared error of its attention output in every step: 0 is
            full context, 1 is silence. The first is that of the window, if the memory was new.
    """

    errors: dict[int, list[float]]

    def __str__(self) -> str:
        lines = [
            f"layer {layer}: error {errors[0]:.4f} -> {errors[-1]:.4f}"
            for layer, errors in self.errors.items()
            if errors
        ]
        return "\n".join(lines) or "no step was made"


def distill(
    model: nn.Module,
    batches: Iterable[tuple[Any, ...]],
    *,
    steps: int | None = None,
    lr: float = 3e-3,
    weight_decay: float = 0.0,
    pct_start: float = 0.05,
    max_norm: float = 1.0,
    progress: bool = True,
) -> Distilled:
    """Train the memory of a patched model to match its layers' full-context attention.

    One forward pass of Moshi serves all layers, and no gradient goes through the model: it takes
    one layer's activations at a time beside the model itself. Only the caches' weights change; they
    are float32 meanwhile and return to the model's dtype.

    Args:
        model: patched; sequences should be well beyond `recent + chunk`, within its context.
        batches: tuples of the arguments of `model.forward`, one for each step: `(codes,)` for an
            `LMModel`, codes int64 `[B, K, T]`, where frames of nothing but `zero_token_id` are
            padding: they count for nothing.
        steps: how many of them to take; all of them by default, which then need a length.
        lr: highest learning rate of AdamW, after the share `pct_start` of the steps.
        max_norm: gradients of all layers together are clipped to this norm.
        progress: show a progress bar on standard error.

    Raises:
        TypeError: a batch is not a tuple, or an argument is of the wrong type.
        ValueError: there are no batches, fewer than `steps`, or none whose sequences leave the
            window; there is nothing to train, or an argument is out of range.
        RuntimeError: the model is not patched, is streaming, or an error or gradient is not finite;
            the message names step and layer, and that step changes nothing.

    Warns:
        RuntimeWarning: batches without a length ran out before `steps`.

    Example:
        >>> ttt_cache.patch(model, recent=100)
        >>> print(ttt_cache.distill(model, [(codes,) for codes in recordings]))
    """
    handle = require_patch(model)
    steps = _steps(steps, batches)
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("max_norm", max_norm)):
        real_number(name, value)
    real_number("pct_start", pct_start, 0, 1)
    true_or_false("progress", progress)
    trained = _trained(handle)
    errors: dict[int, list[float]] = {layer: [] for layer in sorted(handle.layers)}
    taken, learned = 0, False
    console = Console(stderr=True)
    with float32_adapter(handle):
        optimizer, schedule = optimizer_for(trained, lr, weight_decay, steps, pct_start)
        shown = track(
            islice(batches, steps), "distil", steps, console=console, disable=not progress
        )
        try:
            for batch in shown:
                optimizer.zero_grad()
                for layer, error in _learn(handle, model, taken, batch).items():
                    errors[layer].append(_finite(taken, f"error of layer {layer}", error))
                norm = torch.nn.utils.clip_grad_norm_(trained, max_norm)
                learned |= _finite(taken, "norm of the gradient", norm) > 0
                optimizer.step()
                schedule.step()
                taken += 1
        finally:
            optimizer.zero_grad()
    _enough(taken, steps, learned)
    return Distilled(errors)


def _trained(handle: Patch) -> list[nn.Parameter]:
    """What requires gradients; shared weights once."""
    trained = [p for cache in handle.caches.values() for p in cache.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(
            f"model has nothing to train: memory={handle.config.memory!r} without trainable weights"
        )
    return list({id(p): p for p in trained}.values())


def _steps(steps: int | None, batches: Iterable[Any]) -> int:
    most = len(batches) if isinstance(batches, Sized) else None
    if most == 0:
        raise ValueError("batches must hold at least one batch, got none")
    if steps is None:
        if most is None:
            raise TypeError("steps must be given where batches have no length")
        return most
    whole_number("steps", steps, 1)
    if most is not None and most < steps:
        raise ValueError(f"steps must be at most the {most} batches that there are, got {steps}")
    return steps


def _enough(taken: int, steps: int, learned: bool) -> None:
    """Do not let distillation that taught nothing, or was cut short, pass for a success."""
    if not taken:
        raise ValueError("batches must hold at least one batch, got none")
    if not learned:
        raise ValueError(
            "batches must hold sequences well beyond recent + chunk: in none of them anything left "
            "the window, so no memory was read and nothing was trained"
        )
    if taken < steps:
        warnings.warn(
            f"batches ran out after {taken} of {steps} steps, while the learning rate was still "
            f"high: give steps={taken}, or more batches",
            RuntimeWarning,
            stacklevel=3,
        )


def _learn(handle: Patch, model: nn.Module, step: int, batch: Any) -> dict[int, Tensor]:
    if not isinstance(batch, tuple):
        raise TypeError(
            f"batches must be tuples of the arguments of model.forward; batch {step} is a "
            f"{type(batch).__name__}"
        )
    return lesson(handle, lambda: model(*batch), _counts(model, batch))


def _counts(model: nn.Module, batch: tuple[Any, ...]) -> Tensor | None:
    """The frames that are not padding, bool `[B, T]`; `None` where all count."""
    if not isinstance(model, LMModel) or not batch or not isinstance(batch[0], Tensor):
        return None
    return (batch[0] != model.zero_token_id).any(1)


def _finite(step: int, what: str, found: Tensor) -> float:
    number = float(found)
    if not math.isfinite(number):
        raise RuntimeError(f"step {step}: the {what} is {number}")
    return number
