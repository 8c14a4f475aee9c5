"""What one optimizer step computes: losses and gradients, the same over any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from accelerate import Accelerator
from moshi.models.lm import LMModel
from torch import Tensor, nn

from ttt_cache.patch import Patch

from .carry import Carry
from .data import Batch, LMFacts, SegmentStream
from .lesson import lesson
from .loss import Logits, Targets, Weights, cross_entropy, divergence, predict, targets
from .monitor import Observed, observe


class Predictor(nn.Module):
    """A language model whose forward pass gives a segment's logits, for accelerate to wrap."""

    def __init__(self, lm: LMModel) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, codes: Tensor) -> Logits:
        return predict(self.lm, codes)


@dataclass
class Lane:
    """One microbatch: its rows of the data, and the states that go with them.

    Attributes:
        teacher: full-context states, where its predictions are matched.
    """

    stream: SegmentStream
    carry: Carry
    teacher: Carry | None = None

    def carries(self) -> dict[str, Carry]:
        """What goes on from segment to segment, by name."""
        both = {"student": self.carry, "teacher": self.teacher}
        return {name: carry for name, carry in both.items() if carry is not None}


@dataclass(frozen=True)
class Objective:
    """What is minimised: moshi-finetune's loss, and `distillation` times the divergence."""

    weights: Weights
    distillation: float


def distil(
    accelerator: Accelerator,
    lm: LMModel,
    handle: Patch,
    batches: Sequence[Batch],
    observing: Patch | None,
) -> tuple[dict[str, Tensor], dict[int, Observed]]:
    """Add the gradients of each layer's error, averaged over rows.

    Every segment is taken by itself, and padding is left out.

    Returns:
        `error/LAYER`, and what was observed, as from `fine_tune`.
    """
    facts = LMFacts.of(lm)
    found: dict[str, list[Tensor]] = {}
    observed: dict[int, Observed] = {}
    for batch in batches:
        codes = batch.codes.to(accelerator.device)
        counts = facts.counts(codes)
        with accelerator.autocast():
            errors = lesson(handle, lambda codes=codes: predict(lm, codes), counts)
            if observing is not None and batch is batches[0]:
                observed = observe(observing, lambda codes=codes: predict(lm, codes), counts)
        for layer, error in errors.items():
            found.setdefault(f"error/{layer}", []).append(error)
    for parameter in lm.parameters():
        if parameter.grad is not None:
            mean = parameter.grad / len(batches)
            parameter.grad = over_processes(accelerator, mean, "mean")
    means = {name: torch.stack(errors).mean() for name, errors in found.items()}
    return {n: over_processes(accelerator, mean, "mean") for n, mean in means.items()}, observed


def fine_tune(
    accelerator: Accelerator,
    model: nn.Module,
    lanes: list[Lane],
    batches: list[Batch],
    objective: Objective,
    observing: Patch | None,
) -> tuple[dict[str, Tensor], dict[int, Observed]]:
    """Add the gradients of the loss of all lanes on all processes, as of one batch.

    Args:
        model: a `Predictor`, as `accelerator.prepare` gave it.
        observing: the patch whose gates are looked at, on the first lane; `None` for no look.

    Returns:
        `loss`, `text_loss`, `audio_loss` and `kl`, the same on every process; what was observed.
    """
    lm: LMModel = accelerator.unwrap_model(model).lm
    facts, device = LMFacts.of(lm), accelerator.device
    wanted = [targets(facts, batch.codes.to(device), objective.weights) for batch in batches]
    totals = torch.stack([totals_of(target) for target in wanted]).sum(0)
    totals = over_processes(accelerator, totals).clamp_min(1e-8)
    sums, observed = torch.zeros(3, device=device), {}
    for lane, batch, target in zip(lanes, batches, wanted, strict=True):
        codes, fresh = batch.codes.to(device), batch.fresh.to(device)
        taught = _teach(accelerator, lm, lane.teacher, codes, fresh)
        with lane.carry.segment(fresh), _synchronised(accelerator, model, lane is lanes[-1]):
            if observing is not None and lane is lanes[0]:
                with accelerator.autocast():
                    run, counts = (lambda codes=codes: predict(lm, codes)), facts.counts(codes)
                    observed = observe(observing, run, counts)
            parts = sums_of(model(codes), target, taught)
            loss = _weighed(parts / totals, objective)
            accelerator.backward(loss * accelerator.num_processes)
        sums += parts.detach()
    means = over_processes(accelerator, sums) / totals
    losses = dict(zip(("text_loss", "audio_loss", "kl"), means.unbind(), strict=True))
    if lanes[0].teacher is None:
        del losses["kl"]
    return {"loss": _weighed(means, objective)} | losses, observed


def over_processes(accelerator: Accelerator, tensor: Tensor, how: str = "sum") -> Tensor:
    """The sum or mean of a tensor over all processes, on each of them."""
    return cast(Tensor, accelerator.reduce(tensor, how))


def totals_of(target: Targets) -> Tensor:
    """What the sums of text, audio and divergence are divided by."""
    text, audio = target.text_weight.sum(), target.audio_weight.sum()
    return torch.stack([text, audio, text + audio])


def sums_of(logits: Logits, target: Targets, taught: Logits | None) -> Tensor:
    """Weighted sums over a segment: of text, of audio, of the divergence of both."""
    text = cross_entropy(logits.text, target.text, target.text_weight)
    audio = cross_entropy(logits.audio, target.audio, target.audio_weight)
    kl = torch.zeros_like(text)
    if taught is not None:
        kl = divergence(logits.text, taught.text, target.text_weight)
        kl = kl + divergence(logits.audio, taught.audio, target.audio_weight)
    return torch.stack([text, audio, kl])


def _weighed(parts: Tensor, objective: Objective) -> Tensor:
    return parts[0] + parts[1] + objective.distillation * parts[2]


def _teach(
    accelerator: Accelerator, lm: LMModel, carry: Carry | None, codes: Tensor, fresh: Tensor
) -> Logits | None:
    if carry is None:
        return None
    with torch.no_grad(), accelerator.autocast(), carry.segment(fresh):
        return predict(lm, codes)


def _synchronised(
    accelerator: Accelerator, model: nn.Module, last: bool
) -> AbstractContextManager[object]:
    """Gradients travel between processes once, with the last lane."""
    return nullcontext() if last else accelerator.no_sync(model)
