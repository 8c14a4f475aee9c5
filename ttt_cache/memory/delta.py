"""What tokens of a chunk do to a network: the delta rule for its last layer, bounded steps before.

Pure functions of N networks, one for each row and memory head, and L tokens for each.
`docs/semantics.md` has the equations; `adjoint.py` is this file backwards, so nothing here needs
autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import network
from .network import EPS, Trace


class Chunk(NamedTuple):
    """What is learned of some tokens of one chunk, in order.

    Attributes:
        k, v: unit keys and normed values, `[N, L, d]`.
        eta: rates, `[N, L, 1]`.
    """

    k: Tensor
    v: Tensor
    eta: Tensor


class Predicted(NamedTuple):
    """What a network says of tokens before it takes them in, one after the other.

    Attributes:
        traces: of the hidden layers.
        phi: features of the keys, `[N, L, m]`.
        error: of each token at the running last layer, `[N, L, d]`.
    """

    traces: list[Trace]
    phi: Tensor
    error: Tensor


class Learned(NamedTuple):
    """What tokens did to a network.

    Attributes:
        last: the last layer after them.
        d_phi: gradient of the loss by the features, `[N, L, m]`; `None` without hidden layers.
        gradients: by the hidden layers, summed over the tokens.
    """

    last: Tensor
    d_phi: Tensor | None
    gradients: list[Tensor]


def predict(chunk: Chunk, hidden: list[Tensor], last: Tensor) -> Predicted:
    """Look at tokens with the hidden layers as they are and the last layer as it runs."""
    traces = network.forward(chunk.k, hidden)
    phi = traces[-1].phi if traces else chunk.k
    residual = torch.baddbmm(chunk.v, phi, last, alpha=-1)
    return Predicted(traces, phi, _errors(phi, residual, chunk.eta))


def learn(chunk: Chunk, hidden: list[Tensor], last: Tensor, predicted: Predicted) -> Learned:
    """Take in the tokens."""
    traces, phi, error = predicted
    new = torch.baddbmm(last, phi.transpose(-1, -2), chunk.eta * error)
    if not traces:
        return Learned(new, None, [])
    # d/dphi of |v - phi F|^2 / 2 at the running F.
    d_phi = -(error @ last.transpose(-1, -2))
    if phi.shape[-2] > 1:
        before = torch.tril(error @ error.transpose(-1, -2), -1)
        d_phi = torch.baddbmm(d_phi, before, chunk.eta * phi, alpha=-1)
    factors = network.backward(d_phi, traces, hidden)
    return Learned(new, d_phi, [a.transpose(-1, -2) @ b for a, b in factors])


def learn_one(chunk: Chunk, hidden: list[Tensor], last: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What a single token adds to the hidden layers' gradients and to the last layer.

    The same as `learn` for L = 1, as outer products that can be added in place.

    Returns:
        for each of them a and b of `a^T b`, `[N, 1, *]`, the last layer's last.
    """
    traces, phi, error = predict(chunk, hidden, last)
    factors = []
    if traces:
        factors = network.backward(-(error @ last.transpose(-1, -2)), traces, hidden)
    return [*factors, (phi, chunk.eta * error)]


def _errors(phi: Tensor, residual: Tensor, eta: Tensor) -> Tensor:
    """Each token's prediction error after the tokens before it: the delta rule's solve."""
    if phi.shape[-2] == 1:
        return residual
    overlap = torch.tril(phi @ phi.transpose(-1, -2), -1) * eta.transpose(-1, -2)
    return torch.linalg.solve_triangular(overlap, residual, upper=False, unitriangular=True)


class Rule(NamedTuple):
    """How a chunk closes.

    Attributes:
        size: tokens of a chunk, C.
        cap: the largest norm of the last layer, per head.
        rates: of the hidden layers, each `[N, 1, 1]`.
        norms: of their columns at version 0, each `[N, 1, columns]`.
    """

    size: int
    cap: float
    rates: list[Tensor]
    norms: list[Tensor]


def step_length(total: Tensor, size: int) -> Tensor:
    """What a step along `total / C` is multiplied by to be shorter than 1: of `total` itself."""
    square = (total * total).sum((-1, -2), keepdim=True)
    return torch.rsqrt(1 + square / size**2) / size


def inverse_norm(z: Tensor, dims: tuple[int, ...]) -> Tensor:
    """`1 / |z|` over `dims`, smooth at zero."""
    return torch.rsqrt((z * z).sum(dims, keepdim=True) + EPS)


def close(
    hidden: list[Tensor],
    last: Tensor,
    totals: list[Tensor],
    rule: Rule,
    closes: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """The weights of the next version, where `closes` (bool `[N, 1, 1]`; `None`: everywhere).

    Args:
        totals: gradients by the hidden layers, summed over the chunk.
    """
    new = []
    for weight, total, rate, norm in zip(hidden, totals, rule.rates, rule.norms, strict=True):
        step = rate * step_length(total, rule.size)
        step = step if closes is None else torch.where(closes, step, 0)
        weight = torch.addcmul(weight, step, total, value=-1)
        scale = norm * inverse_norm(weight, (-2,))
        new.append(weight * (scale if closes is None else torch.where(closes, scale, 1)))
    shrink = (rule.cap * inverse_norm(last, (-1, -2))).clamp(max=1)
    return new, last * (shrink if closes is None else torch.where(closes, shrink, 1))
