"""Optimizer and learning rate: moshi-finetune's AdamW, over one cycle.

AdamW is as in moshi-finetune. The cycle is simpler than torch's OneCycleLR, which moshi-finetune
takes: that rises along a cosine from a 25th of the rate, and moves AdamW's first beta along.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def optimizer_for(
    parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, steps: int, pct_start: float
) -> tuple[Optimizer, LambdaLR]:
    """AdamW, and a learning rate that rises to `lr` over the share `pct_start` of `steps` steps and
    falls along a cosine after it."""
    optimizer = torch.optim.AdamW(
        parameters, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay
    )
    return optimizer, LambdaLR(optimizer, lambda step: one_cycle(step, steps, pct_start))


def one_cycle(step: int, steps: int, pct_start: float) -> float:
    """Share of the highest learning rate in a step, counted from 0; never 0 before the end."""
    rise = round(pct_start * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    return (1 + math.cos(math.pi * (step - rise) / (steps - rise + 1))) / 2
