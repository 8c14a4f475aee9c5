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

from .recipe import Recipe


def tune(
    lm: LMModel, handle: Patch, batches: Iterable[Tensor], recipe: Recipe, progress: bool = True
) -> list[float]:
    """Train the memory of a patched model by what it predicts, as `recipe.tune` says.

    Args:
        batches: codes, not delayed, int64 `[B, K, T]`, one for each step.

    Returns:
        the loss of every step.

    Raises:
        RuntimeError: a loss is not finite; the adapter is as it was before that step.
    """
    course, trained = recipe.tune, adapter_parameters(lm)
    losses: list[float] = []
    shown = track(batches, "tune", course.steps, console=Console(stderr=True), disable=not progress)
    with float32_adapter(handle):
        optimizer, schedule = optimizer_for(
            trained, course.lr, course.weight_decay, course.steps, course.pct_start
        )
        for codes in shown:
            loss = loss_of(lm, handle, codes.to(next(lm.parameters()).device), recipe)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise RuntimeError(f"step {len(losses)}: the loss is {losses[-1]}")
            gradients = torch.autograd.grad(loss, trained)
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(trained, course.max_norm)
            optimizer.step()
            schedule.step()
        optimizer.zero_grad()
    return losses


def loss_of(lm: LMModel, handle: Patch, codes: Tensor, recipe: Recipe) -> Tensor:
    """Moshi's loss and the divergence from full context, as the recipe weighs them; a scalar."""
    facts = LMFacts.of(lm)
    delayed = torch.stack([facts.delayed(row) for row in codes])
    wanted = targets(facts, delayed, Weights(1.0, recipe.text_padding))
    loss = torch.zeros((), device=codes.device)
    logits = predict(lm, delayed)
    if recipe.moshi:
        loss = loss + recipe.moshi * _weighed(logits, None, wanted, recipe)
    if recipe.moshi < 1:
        with torch.no_grad(), unpatched(handle):
            taught = predict(lm, delayed)
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
