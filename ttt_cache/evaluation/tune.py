"""The memory learns from what the model predicts: end to end, the base model frozen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from moshi.models.lm import LMModel
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from ttt_cache.patch import Patch, adapter_parameters
from ttt_cache.training.data import LMFacts
from ttt_cache.training.loss import (
    Logits,
    Targets,
    Weights,
    cross_entropy,
    divergence,
    predict,
    targets,
)
from ttt_cache.training.masters import float32_adapter
from ttt_cache.training.schedule import optimizer_for

from .recipe import Course, Recipe


def learn(
    lm: LMModel, handle: Patch, course: Course, losses: Iterable[Tensor], what: str, progress: bool
) -> list[float]:
    """Train the memory of a patched model on one loss after another, AdamW over one cycle.

    Args:
        losses: scalars with their graph, one for each step of the course.
        what: it is called in the progress bar.

    Returns:
        the loss of every step.

    Raises:
        RuntimeError: a loss is not finite; the adapter is as it was before that step.
    """
    trained, seen = adapter_parameters(lm), []
    shown = track(losses, what, course.steps, console=Console(stderr=True), disable=not progress)
    with float32_adapter(handle):
        optimizer, schedule = optimizer_for(
            trained, course.lr, course.weight_decay, course.steps, course.pct_start
        )
        for loss in shown:
            seen.append(loss.item())
            if not math.isfinite(seen[-1]):
                raise RuntimeError(f"step {len(seen)}: the loss is {seen[-1]}")
            gradients = torch.autograd.grad(loss, trained)
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(trained, course.max_norm)
            optimizer.step()
            schedule.step()
        optimizer.zero_grad()
    return seen


def tuning(
    lm: LMModel, handle: Patch, batches: Iterable[Tensor], recipe: Recipe
) -> Iterator[Tensor]:
    """The loss of every step of `recipe.tune`, a scalar: of conversations from their beginning.

    Args:
        batches: codes, not delayed, int64 `[B, K, T]`, one for each step.
    """
    facts, device = LMFacts.of(lm), next(lm.parameters()).device
    for codes in batches:
        delayed = torch.stack([facts.delayed(row) for row in codes]).to(device)
        taught = None
        if recipe.moshi < 1:
            with torch.no_grad(), unpatched(handle):
                taught = predict(lm, delayed)
        yield loss_beside(lm, delayed, taught, recipe)


def loss_beside(lm: LMModel, delayed: Tensor, taught: Logits | None, recipe: Recipe) -> Tensor:
    """Moshi's loss and the divergence from a teacher, as the recipe weighs them; a scalar.

    Args:
        delayed: codes `[B, K, T + 1]`, as `ttt_cache.training.loss.predict` takes them.
        taught: what the teacher predicts; `None` where Moshi's loss is all.
    """
    wanted = targets(LMFacts.of(lm), delayed, Weights(1.0, recipe.text_padding))
    loss = torch.zeros((), device=delayed.device)
    logits = predict(lm, delayed)
    if recipe.moshi:
        loss = loss + recipe.moshi * _weighed(logits, None, wanted, recipe)
    if taught is not None:
        loss = loss + (1 - recipe.moshi) * _weighed(logits, taught, wanted, recipe)
    return loss


def _weighed(logits: Logits, taught: Logits | None, wanted: Targets, recipe: Recipe) -> Tensor:
    """Means over text and over audio: cross-entropy, or divergence where there is a teacher."""
    if taught is None:
        text = cross_entropy(logits.text, wanted.text, wanted.text_weight)
        audio = cross_entropy(logits.audio, wanted.audio, wanted.audio_weight)
    else:
        text = divergence(logits.text, taught.text, wanted.text_weight)
        audio = divergence(logits.audio, taught.audio, wanted.audio_weight)
    text = text / wanted.text_weight.sum().clamp_min(1e-8)
    return text + recipe.audio * audio / wanted.audio_weight.sum().clamp_min(1e-8)


@contextmanager
def unpatched(handle: Patch) -> Iterator[None]:
    """Within it the model is stock Moshi."""
    handle.remove()
    try:
        yield
    finally:
        handle.install()
