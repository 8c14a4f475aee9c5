"""One streaming step of the TTT memory, slowly: what `memory_step` must compute.

A runnable specification, one row and one head after the other, in the dtype of the fast weights
(float64 for an exact answer). The equations are in `kernels/README.md` and `docs/semantics.md`;
the gradient is autograd's, so that nobody's derivation is tested against itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6
SOFT = 1e-2  # of an answer: one that is nearly nothing is not blown up
LARGEST = 1e15  # of a projected feature


class MemoryWeights(NamedTuple):
    """What a memory has learned in training: h heads of width d, n hidden units, M slots.

    Attributes:
        rate: bias of the learning rate, `[h]`.
        slots: slot queries, `[h, M, d]`.
        first: version 0 of W1, `[h, d, n]`; `None` for a linear memory.
        last: version 0 of F, `[h, n, d]`, or `[h, d, d]` for a linear memory.
        step_size: logit of W1's rate, `[1, h]`; `None` for a linear memory.
    """

    rate: Tensor
    slots: Tensor
    first: Tensor | None
    last: Tensor
    step_size: Tensor | None


class MemoryRows(NamedTuple):
    """What a memory holds of B conversations; a row that has not begun is all zeros.

    Attributes:
        waiting: features of the tokens that wait for the memory, `[B, 1, N, F]`, F = (2 d + 1) h;
            N = 0 if it takes them in as they arrive.
        first: W1, `[B, h, d, n]`; `None` for a linear memory.
        gradient: of W1 so far in this chunk, likewise.
        last: the linear layer F, `[B, h, n, d]`, or `[B, h, d, d]` for a linear memory.
        readout: of the newest version, `[B, M, h d]`.
    """

    waiting: Tensor
    first: Tensor | None
    gradient: Tensor | None
    last: Tensor
    readout: Tensor


def memory_step(
    features: Tensor,
    count: Tensor,
    mask: Tensor,
    weights: MemoryWeights,
    rows: MemoryRows,
    chunk: int,
) -> None:
    """Advance the memory of the rows of `mask` by one token, in place.

    Args:
        features: of the new token, `[B, F]`: keys, values and rates of all heads.
        count: tokens before it, int64 `[B]`; it is not advanced here.
        mask: bool `[B]`; other rows keep their bits.
        chunk: tokens that make one version, C.
    """
    wait = rows.waiting.shape[2]
    for row in mask.nonzero()[:, 0].tolist():
        token = int(count[row]) + 1
        leaving = features[row]
        if wait:
            slot = rows.waiting[row, 0, (token - 1) % wait]
            leaving = slot.clone()  # of the token N before this one
            slot.copy_(features[row])
        fed = token - wait
        if fed > 0:
            _begin(weights, rows, row, fed)
            _feed(leaving, weights, rows, row)
            if fed % chunk == 0:
                _close(weights, rows, row, chunk)
                _publish(weights, rows, row)


def _begin(weights: MemoryWeights, rows: MemoryRows, row: int, fed: int) -> None:
    if fed == 1:
        rows.last[row] = weights.last
        if rows.first is not None and rows.gradient is not None and weights.first is not None:
            rows.first[row] = weights.first
            rows.gradient[row] = 0


def _feed(leaving: Tensor, weights: MemoryWeights, rows: MemoryRows, row: int) -> None:
    heads, _, d = weights.slots.shape
    parts = (
        leaving.to(rows.last.dtype).clamp(-LARGEST, LARGEST).split([heads * d, heads * d, heads])
    )
    for head in range(heads):
        k, v, logit = (part.unflatten(0, (heads, -1))[head] for part in parts)
        k, v = _unit(k), v * torch.rsqrt(v.square().mean() + EPS)
        eta = torch.sigmoid(logit + weights.rate[head].to(logit.dtype))
        last = rows.last[row, head]
        if rows.first is not None and rows.gradient is not None:
            rows.gradient[row, head] += _gradient(k, v, rows.first[row, head], last)
        phi = _features(k, None if rows.first is None else rows.first[row, head])
        last += torch.outer(phi, eta * (v - phi @ last))


def _gradient(k: Tensor, v: Tensor, first: Tensor, last: Tensor) -> Tensor:
    with torch.enable_grad():
        first = first.clone().requires_grad_()
        loss = (v - _features(k, first) @ last).square().sum() / 2
        return torch.autograd.grad(loss, first)[0]


def _close(weights: MemoryWeights, rows: MemoryRows, row: int, chunk: int) -> None:
    for head, last in enumerate(rows.last[row]):
        last *= (math.sqrt(last.numel()) * torch.rsqrt(last.square().sum() + EPS)).clamp(max=1)
        if rows.first is not None and rows.gradient is not None:
            assert weights.first is not None and weights.step_size is not None
            first, mean = rows.first[row, head], rows.gradient[row, head] / chunk
            rate = torch.sigmoid(weights.step_size[0, head])
            first -= rate * mean * torch.rsqrt(1 + mean.square().sum())
            norms = torch.linalg.vector_norm(weights.first[head], dim=0)
            first *= norms * torch.rsqrt(first.square().sum(0) + EPS)
            rows.gradient[row, head] = 0


def _publish(weights: MemoryWeights, rows: MemoryRows, row: int) -> None:
    for head, last in enumerate(rows.last[row]):
        first = None if rows.first is None else rows.first[row, head]
        slots = _unit(weights.slots[head].to(last.dtype))
        answers = _features(slots, first) @ last
        norm = torch.rsqrt(answers.square().mean(-1, keepdim=True) + SOFT)
        rows.readout[row].unflatten(-1, (rows.last.shape[1], -1))[:, head] = answers * norm


def _features(k: Tensor, first: Tensor | None) -> Tensor:
    return k if first is None else _unit(F.gelu(k @ first, approximate="tanh"))


def _unit(z: Tensor) -> Tensor:
    return z * torch.rsqrt(z.square().sum(-1, keepdim=True) + EPS)
