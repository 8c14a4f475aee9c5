"""Chunk after chunk through the TTT memory, slowly: what `memory_scan` must compute.

A runnable specification, one network and one token after the other (float64 for an exact answer).
The equations are in `docs/semantics.md`. The gradient of the inner loss is autograd's, and so are
those of the outer one through it: nobody's derivation is tested against itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6


def memory_scan(
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    first: Tensor | None,
    last: Tensor,
    total: Tensor | None,
    rate: Tensor | None,
    norm: Tensor | None,
    closes: Tensor,
    chunk: int,
    cap: float,
) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor, Tensor | None]:
    """What `kernels.memory_scan.memory_scan` computes, for the same arguments."""
    firsts, lasts, totals = [], [], []
    for net in range(last.shape[0]):
        hidden = None
        if first is not None and total is not None and rate is not None and norm is not None:
            hidden = (first[net], total[net], rate[net], norm[net])
        found = _network(
            (k[:, net], v[:, net], eta[:, net]), hidden, last[net], closes[:, net], chunk, cap
        )
        firsts.append(found[0])
        lasts.append(found[1])
        totals.append(found[2])
    every_last = torch.stack(lasts, 1)
    if first is None:
        return None, every_last, None, every_last[-1], None
    every_first = torch.stack(firsts, 1)
    return every_first, every_last, every_first[-1], every_last[-1], torch.stack(totals)


def _network(tokens, hidden, last, closes, chunk, cap):
    """One network: its versions and what it has gathered at the end."""
    firsts, lasts = [], []
    first, total, rate, norm = hidden or (None,) * 4
    for k_chunk, v_chunk, eta_chunk, ends in zip(*tokens, closes, strict=True):
        for k, v, eta in zip(k_chunk, v_chunk, eta_chunk, strict=True):
            if first is not None and total is not None:
                total = total + _gradient(k, v, first, last)
            phi = _features(k, first)
            last = last + torch.outer(phi, eta * (v - phi @ last))
        if ends:
            last = last * (cap * torch.rsqrt(last.square().sum() + EPS)).clamp(max=1)
            if first is not None and total is not None:
                mean = total / chunk
                first = first - rate * mean * torch.rsqrt(1 + mean.square().sum())
                first = first * norm * torch.rsqrt(first.square().sum(0) + EPS)
                total = torch.zeros_like(total)
        firsts.append(first)
        lasts.append(last)
    return None if first is None else torch.stack(firsts), torch.stack(lasts), total


def _gradient(k: Tensor, v: Tensor, first: Tensor, last: Tensor) -> Tensor:
    with torch.enable_grad():
        # W1 by a name of its own: F depends on it too, through the tokens before.
        here = first.clone() if first.requires_grad else first.clone().requires_grad_()
        loss = (v - _features(k, here) @ last).square().sum() / 2
        return torch.autograd.grad(loss, here, create_graph=True)[0]


def _features(k: Tensor, first: Tensor | None) -> Tensor:
    if first is None:
        return k
    a = F.gelu(k @ first, approximate="tanh")
    return a * torch.rsqrt(a.square().sum(-1, keepdim=True) + EPS)
