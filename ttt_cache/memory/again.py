"""What a run of chunks did, made again for all chunks at once, for the way back.

Everything that `adjoint.py` needs and that depends on no gradient of the outer loss, `[K, N, *]`.
Read beside `delta.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import delta, network
from .delta import Chunk, Rule
from .network import Trace


class Layer(NamedTuple):
    """A hidden layer: `z = given W`, `a = gelu(z)`, `rho = 1 / |a|`, `phi = rho a`.

    Its own gradient is `given^T d` with `alpha = delta - phi (phi . delta)`,
    `d = rho gelu'(z) alpha`, and `delta` the gradient of the inner loss by phi.
    """

    weight: Tensor
    given: Tensor
    phi: Tensor
    rho: Tensor
    slope: Tensor  # rho gelu'(z): of phi by z without the norm's part, and of d by alpha
    delta: Tensor
    along: Tensor  # phi . delta
    d: Tensor
    d_by_rho: Tensor
    d_by_z: Tensor

    @classmethod
    def of(cls, weight: Tensor, trace: Trace, delta_: Tensor) -> Layer:
        given, z, rho, phi = trace
        slope = network.through_gelu(torch.ones_like(z), z)
        along = (phi * delta_).sum(-1, keepdim=True)
        alpha = delta_ - phi * along
        curved = alpha * rho * network.gelu_curve(z)
        steep = alpha * slope
        slope = rho * slope
        return cls(weight, given, phi, rho, slope, delta_, along, rho * steep, steep, curved)


class Step(NamedTuple):
    """How a hidden layer closes: `w = W - step total`, `W' = scale w`."""

    total: Tensor
    step: Tensor
    length: Tensor  # step by the rate
    bend: Tensor  # -step by |total|^2 / 2
    w: Tensor
    scale: Tensor
    inverse: Tensor  # scale by the norm at version 0: 1 / |column of w|
    pull: Tensor  # -scale by |column of w|^2 / 2

    @classmethod
    def of(
        cls, weight: Tensor, total: Tensor, rate: Tensor, norm: Tensor, size: int, closes: Tensor
    ) -> Step:
        length = torch.where(closes, delta.step_length(total, size), 0)
        step = rate * length
        w = torch.addcmul(weight, step, total, value=-1)
        inverse = torch.where(closes, delta.inverse_norm(w, (-2,)), 0)
        scale = norm * inverse
        pull = scale * inverse.square()
        bend = step * length.square()
        return cls(total, step, length, bend, w, torch.where(closes, scale, 1), inverse, pull)


class Cap(NamedTuple):
    """How the last layer closes: `F' = shrink F`."""

    full: Tensor
    shrink: Tensor
    pull: Tensor  # -shrink by |F|^2 / 2

    @classmethod
    def of(cls, last: Tensor, cap: float, closes: Tensor) -> Cap:
        inverse = delta.inverse_norm(last, (-1, -2))
        binds = closes & (cap * inverse < 1)
        shrink = torch.where(binds, cap * inverse, 1)
        return cls(last, shrink, torch.where(binds, shrink * inverse.square(), 0))


class Rows(NamedTuple):
    """The delta rule within a chunk: `A Error = V - Phi F`, `A = I + (Phi Phi^T) * later`.

    `later` has eta_t where s > t, so that `later * X` couples token s to those before it.
    """

    last: Tensor
    eta: Tensor
    error: Tensor
    rated: Tensor  # eta error
    later: Tensor
    solve: Tensor  # A^-T
    coupling: Tensor  # (Error Error^T * later)^T

    @classmethod
    def of(cls, chunk: Chunk, phi: Tensor, error: Tensor, last: Tensor) -> Rows:
        eta, tokens = chunk.eta, chunk.eta.shape[-2]
        eye = torch.eye(tokens, dtype=eta.dtype, device=eta.device)
        later = torch.ones_like(eye).tril(-1) * eta.transpose(-1, -2)
        overlap = phi @ phi.transpose(-1, -2) * later
        solve = torch.linalg.solve_triangular(
            overlap, eye.expand_as(overlap), upper=False, unitriangular=True
        )
        coupling = error @ error.transpose(-1, -2) * later
        turned = solve.transpose(-1, -2), coupling.transpose(-1, -2)
        return cls(last, eta, error, eta * error, later, *turned)


class Again:
    """All chunks of a run, made again.

    Args:
        hidden, last: the weights before each chunk, `[K, N, rows, columns]`.
        totals, rule, closes: as the run was given them.
    """

    def __init__(
        self,
        chunk: Chunk,
        hidden: list[Tensor],
        last: Tensor,
        totals: list[Tensor],
        rule: Rule,
        closes: Tensor,
    ) -> None:
        every = closes.shape[:2]  # all chunks of all networks at once
        flat = Chunk(*(z.flatten(0, 1) for z in chunk))
        weights = [w.flatten(0, 1) for w in hidden], last.flatten(0, 1)
        predicted = delta.predict(flat, *weights)
        learned = delta.learn(flat, *weights, predicted)
        self.open = (~closes).to(last.dtype)
        self.phi = predicted.phi.unflatten(0, every)
        self.rows = Rows.of(chunk, self.phi, predicted.error.unflatten(0, every), last)
        self.cap = Cap.of(learned.last.unflatten(0, every), rule.cap, closes)
        self.layers: list[Layer] = []
        d_phi = learned.d_phi
        for weight, trace in zip(reversed(weights[0]), reversed(predicted.traces), strict=True):
            assert d_phi is not None
            layer = Layer.of(weight, trace, d_phi)
            d_phi = layer.d @ weight.transpose(-1, -2)
            self.layers.insert(0, Layer(*(z.unflatten(0, every) for z in layer)))
        self.steps = []
        for n, weight in enumerate(hidden):
            total = learned.gradients[n].unflatten(0, every)
            total[0] += totals[n]  # of a chunk that was begun before
            self.steps.append(
                Step.of(weight, total, rule.rates[n], rule.norms[n], rule.size, closes)
            )
