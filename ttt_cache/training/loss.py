"""moshi-finetune's loss, on codes that are delayed already.

Cross-entropy of text and audio apart, each a weighted mean over the tokens that exist; audio counts
its first codebook, and text its padding, with a weight of their own. Sums and weights are kept
apart, so that parts of a batch on several processes add up to the loss of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from torch import Tensor

from .data import LMFacts


class Logits(NamedTuple):
    """What a model predicts at each of T frames."""

    text: Tensor  # [B, T, text_card]
    audio: Tensor  # [B, dep_q, T, card]


class Targets(NamedTuple):
    """What the logits should predict, int64, and how much each counts, float32; 0 if not at all."""

    text: Tensor  # [B, T]
    text_weight: Tensor
    audio: Tensor  # [B, dep_q, T]
    audio_weight: Tensor


@dataclass(frozen=True)
class Weights:
    """`first_codebook_weight_multiplier` and `text_padding_weight` of moshi-finetune."""

    first_codebook: float
    text_padding: float


def predict(lm: LMModel, codes: Tensor) -> Logits:
    """Logits of a segment of delayed codes `[B, K, T + 1]`, each column from those before it."""
    hidden, text = lm.forward_text(codes[:, :, :-1])
    return Logits(text[:, 0], lm.forward_depformer_training(codes[:, :, 1:], hidden))


def targets(facts: LMFacts, codes: Tensor, weights: Weights) -> Targets:
    """What a segment's logits should predict; initial and missing tokens do not count."""
    counts = facts.predicted(codes).float()
    text, audio = codes[:, 0, 1:], codes[:, 1 : 1 + facts.dep_q, 1:]
    padding = (text == facts.text_padding) | (text == facts.end_of_text_padding)
    text_weight = torch.where(padding, counts[:, 0] * weights.text_padding, counts[:, 0])
    audio_weight = counts[:, 1 : 1 + facts.dep_q]
    audio_weight[:, :1] *= weights.first_codebook
    return Targets(text, text_weight, audio, audio_weight)


def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum over all tokens, float32; tokens of weight 0 may be anything."""
    wanted = torch.where(weight > 0, target, 0)
    each = F.cross_entropy(logits.float().flatten(0, -2), wanted.flatten(), reduction="none")
    return torch.where(weight.flatten() > 0, each * weight.flatten(), 0).sum()


def divergence(logits: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum over all tokens of KL(teacher | logits), in nats, float32."""
    log_p = F.log_softmax(teacher.float(), dim=-1)
    each = (log_p.exp() * (log_p - F.log_softmax(logits.float(), dim=-1))).sum(-1)
    return torch.where(weight > 0, each * weight, 0).sum()
