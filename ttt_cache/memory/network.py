"""The network that a row trains: layers of fast weights, features of unit length, gradients.

A head's network is `unit(gelu(. W1))` once, twice (depth 3) or not at all (linear), and then a
linear layer F. Gradients are written out, since streaming runs without autograd and training goes
through the inner update with it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..precision import wide

EPS = 1e-6
READ_EPS = 1e-2  # of an answer: one that is nearly nothing is not blown up to the size of a memory


def unit(z: Tensor) -> Tensor:
    """`z / |z|` along the last axis, smooth at zero."""
    return z * torch.rsqrt(z.square().sum(-1, keepdim=True) + EPS)


def rms_norm(z: Tensor, eps: float = EPS) -> Tensor:
    """`z` with a root mean square of 1 along the last axis, smooth at zero."""
    return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)


def gelu(z: Tensor) -> Tensor:
    """GELU in its tanh form, which has the same value in every backend."""
    return F.gelu(z, approximate="tanh")


def through_gelu(by_gelu: Tensor, z: Tensor) -> Tensor:
    """A gradient by `gelu(z)`, as one by z."""
    return torch.ops.aten.gelu_backward(by_gelu, z, approximate="tanh")


def gelu_curve(z: Tensor) -> Tensor:
    """Second derivative of `gelu`."""
    c, cubic = math.sqrt(2 / math.pi), 0.044715
    square = z * z
    t = torch.tanh(c * z * (1 + cubic * square))
    slope = c * (1 + 3 * cubic * square)
    return (1 - t * t) * (slope + 3 * c * cubic * square - z * t * slope * slope)


class FastWeights(nn.Module):
    """Version 0 of the fast weights and the inner learning rates, float32 or wider always.

    `module.to(bfloat16)` and `.half()` leave them so: bfloat16 would round the updates away.

    Args:
        heads: memory heads, h.
        widths: of keys, of each hidden layer, and of values; one layer between each two.
    """

    step_size: nn.Parameter

    def __init__(self, heads: int, widths: list[int], device=None, dtype=None) -> None:
        super().__init__()
        factory = {"device": device, "dtype": wide(dtype)}
        self.hidden = [f"w{i}" for i in range(1, len(widths) - 1)]
        self.last = f"w{len(widths) - 1}"
        for name, rows, columns in zip(self.hidden, widths, widths[1:], strict=False):
            # Unit inputs and columns of norm sqrt(rows): pre-activations of order 1, where GELU
            # bends.
            weight = torch.randn(heads, rows, columns, **factory)
            self.register_parameter(name, nn.Parameter(weight))
        start = torch.zeros(heads, widths[-2], widths[-1], **factory)
        self.register_parameter(self.last, nn.Parameter(start))
        if self.hidden:
            steps = torch.full((len(self.hidden), heads), -2.0, **factory)
            self.step_size = nn.Parameter(steps)

    @property
    def layers(self) -> dict[str, Tensor]:
        """Every layer of version 0, `[h, rows, columns]`, by name."""
        return {name: getattr(self, name) for name in (*self.hidden, self.last)}

    @property
    def dtype(self) -> torch.dtype:
        """float32 or wider."""
        return getattr(self, self.last).dtype

    def _apply(self, fn, recurse=True):
        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            kept = wide(moved.dtype)
            return moved if kept == moved.dtype else tensor.to(device=moved.device, dtype=kept)

        return super()._apply(keep_wide, recurse)


class Trace(NamedTuple):
    """One hidden layer's pass: its input, `z = input W`, `1 / |gelu(z)|` and its output."""

    given: Tensor
    z: Tensor
    length: Tensor
    phi: Tensor


def forward(k: Tensor, hidden: list[Tensor]) -> list[Trace]:
    """Put keys `[B, h, T, d]` through the hidden layers; the last trace's `phi` are features."""
    traces = []
    for weight in hidden:
        z = k @ weight
        a = gelu(z)
        length = torch.rsqrt((a * a).sum(-1, keepdim=True) + EPS)
        traces.append(Trace(k, z, length, a * length))
        k = traces[-1].phi
    return traces


def features(k: Tensor, hidden: list[Tensor]) -> Tensor:
    """The features of unit keys: `k` itself without hidden layers."""
    return forward(k, hidden)[-1].phi if hidden else k


def backward(
    d_phi: Tensor, traces: list[Trace], hidden: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Gradients by the hidden weights of a loss with gradient `d_phi`, as products `a^T b`.

    Returns:
        for each layer a and b, its inputs and the gradient by its outputs, `[N, T, *]`.
    """
    factors: list[tuple[Tensor, Tensor]] = []
    for trace, weight in zip(reversed(traces), reversed(hidden), strict=True):
        along = trace.phi * (trace.phi * d_phi).sum(-1, keepdim=True)
        d_z = through_gelu((d_phi - along) * trace.length, trace.z)
        factors.insert(0, (trace.given, d_z))
        if len(factors) < len(hidden):
            d_phi = d_z @ weight.transpose(-1, -2)
    return factors
