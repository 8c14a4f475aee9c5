"""TTT-Linear and TTT-MLP: a network per row, trained by one step of gradient descent per token.

After "Learning to (Learn at Test Time)" (arXiv 2407.04620, section 2) with normalised steps: the
last layer follows the delta rule (arXiv 2406.06484, equation 1; its chunk form is the triangular
solve of section 3 there) on features of unit length, and the layers before it make one bounded step
per chunk. `docs/semantics.md` has the equations and the argument that the weights stay bounded.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import network
from .base import Frames, Memory, MemoryState, by_token
from .network import EPS, READ_EPS, FastWeights, rms_norm, unit

LARGEST = 1e15  # of a projected feature: its square still fits float32


class Learned(NamedTuple):
    """What one chunk did to the last layer."""

    phi: Tensor  # features of the keys, [B, h, L, m]
    eta: Tensor  # rates, [B, h, L, 1]
    error: Tensor  # of each token at the running weights, [B, h, L, d]


class TTT(Memory):
    """A network per row and memory head that learns to tell values from keys.

    Args:
        width_in: width of the source, `|s|`.
        source: what is learned of a token: `hidden`, `kv` or `output`.
        heads: memory heads h; `head_dim` d is per memory head.
        hidden: widths of the hidden layers; none for TTT-Linear.
        chunk: tokens per memory version, C.
        slots: learned slot queries per head, M; `None` if tokens ask with queries of their own.
        publishes: whether a version is kept for queries that may not see the unfinished chunk.
        device, dtype: of the slow weights; the fast weights are float32 or wider.
    """

    def __init__(
        self,
        width_in: int,
        source: str,
        heads: int,
        head_dim: int,
        hidden: list[int],
        chunk: int,
        slots: int | None,
        publishes: bool,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.source, self.publishes = source, publishes
        self.heads, self.head_dim, self.chunk = heads, head_dim, chunk
        self.latent_dim = heads * head_dim
        self.width = 2 * self.latent_dim + heads
        self.project = nn.Parameter(torch.randn(width_in, self.width, **factory) / width_in**0.5)
        self.rate = nn.Parameter(torch.zeros(heads, **factory))
        if slots is not None:
            self.slot_query = nn.Parameter(torch.randn(heads, slots, head_dim, **factory))
        self.has_slots = slots is not None
        self.fast = FastWeights(heads, [head_dim, *hidden, head_dim], **factory)
        self.cap = math.sqrt([head_dim, *hidden][-1] * head_dim)

    def features(self, frames: Frames) -> Tensor:
        return frames.learned(self.source).to(self.project.dtype) @ self.project

    def initial(self, batch_size: int) -> MemoryState:
        layers = self.fast.layers
        fast = layers | {_grad(name): torch.zeros_like(layers[name]) for name in self.fast.hidden}
        return {name: w.expand(batch_size, *w.shape) for name, w in fast.items()}

    def feed(self, state: MemoryState, token: Tensor) -> MemoryState:
        return self.feed_chunk(state, token[:, None])

    def feed_chunk(
        self, state: MemoryState, tokens: Tensor, valid: Tensor | None = None
    ) -> MemoryState:
        return self._learn(state, tokens, valid)[0]

    def feed_and_answer(
        self, state: MemoryState, tokens: Tensor, valid: Tensor, queries: Tensor
    ) -> tuple[MemoryState, Tensor]:
        """`feed_chunk`, and what each token's query finds after that token.

        Args:
            queries: unit vectors `[B, h, L, d]`, one for each token.

        Returns:
            the state after the tokens, and answers `[B, L, E]`.
        """
        new, learned = self._learn(state, tokens, valid)
        phi = network.features(queries, self._hidden(state))
        seen = torch.tril(phi @ learned.phi.transpose(-1, -2))
        answers = phi @ state[self.fast.last] + seen @ (learned.eta * learned.error)
        return new, by_token(rms_norm(answers, READ_EPS))

    def answer(self, state: MemoryState, queries: Tensor) -> Tensor:
        """Put unit queries `[B, h, L, d]` through the network: `[B, L, E]`."""
        phi = network.features(queries, self._hidden(state))
        return by_token(rms_norm(phi @ state[self.fast.last], READ_EPS))

    def finish(self, state: MemoryState) -> MemoryState:
        new = dict(state)
        for name, step_size in zip(self.fast.hidden, self._step_sizes(), strict=True):
            start = getattr(self.fast, name)
            grad = state[_grad(name)] / self.chunk
            step = grad * torch.rsqrt(1 + grad.square().sum((-1, -2), keepdim=True))
            w = state[name] - torch.sigmoid(step_size)[:, None, None] * step
            norm = torch.linalg.vector_norm(start, dim=-2, keepdim=True)
            new[name] = w * (norm * torch.rsqrt(w.square().sum(-2, keepdim=True) + EPS))
            new[_grad(name)] = torch.zeros_like(grad)
        last = state[self.fast.last]
        size = last.square().sum((-1, -2), keepdim=True)
        new[self.fast.last] = last * (self.cap * torch.rsqrt(size + EPS)).clamp(max=1)
        return new

    def read(self, state: MemoryState, batch_size: int) -> Tensor:
        if self.has_slots:
            return self.answer(state, unit(self.slot_query.to(self.fast.layers["w1"].dtype)))
        weights = [state[name].flatten(1) for name in self.fast.layers]
        return torch.cat(weights, dim=1) if self.publishes else weights[0][:, :0]

    def published(self, readout: Tensor) -> MemoryState:
        """The weights of a version from its read-out, where there are no slots."""
        layers = self.fast.layers
        parts = readout.split([w.numel() for w in layers.values()], dim=1)
        return {n: p.unflatten(1, w.shape) for p, (n, w) in zip(parts, layers.items(), strict=True)}

    def split_heads(self, vectors: Tensor) -> Tensor:
        """Wide and finite, one part per memory head: `[B, L, E]` -> `[B, h, L, d]`.

        A float16 projection may overflow to infinity, which the norms would turn into NaN.
        """
        finite = vectors.to(self.fast.layers["w1"].dtype).clamp(-LARGEST, LARGEST)
        return finite.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _learn(
        self, state: MemoryState, tokens: Tensor, valid: Tensor | None
    ) -> tuple[MemoryState, Learned]:
        if valid is not None:
            # A token of zeros has k = v = phi = 0: it changes nothing.
            tokens = tokens.masked_fill(~valid[..., None], 0)
        both = self.heads * self.head_dim
        k, v, rate = map(self.split_heads, tokens.split([both, both, self.heads], dim=-1))
        k, v = unit(k), rms_norm(v)
        eta = torch.sigmoid(rate + self.rate.to(rate.dtype)[:, None, None])
        hidden, last = self._hidden(state), state[self.fast.last]
        traces = network.forward(k, hidden)
        phi = traces[-1].phi if traces else k
        error = _errors(phi, v - phi @ last, eta)  # against the running weights
        new = state | {self.fast.last: last + phi.transpose(-1, -2) @ (eta * error)}
        if traces:
            # d/dphi of |v - phi F|^2 / 2 at the running F.
            d_phi = -(error @ last.transpose(-1, -2))
            if tokens.shape[1] > 1:
                d_phi = d_phi - torch.tril(error @ error.transpose(-1, -2), -1) @ (eta * phi)
            gradients = network.backward(d_phi, traces, hidden)
            for name, gradient in zip(self.fast.hidden, gradients, strict=True):
                new[_grad(name)] = state[_grad(name)] + gradient
        return new, Learned(phi, eta, error)

    def _hidden(self, state: MemoryState) -> list[Tensor]:
        return [state[name] for name in self.fast.hidden]

    def _step_sizes(self) -> tuple[Tensor, ...]:
        return self.fast.step_size.unbind() if self.fast.hidden else ()


def _grad(name: str) -> str:
    """Where the gradient so far of a layer stands in the state: `w1` -> `grad1`."""
    return name.replace("w", "grad")


def _errors(phi: Tensor, residual: Tensor, eta: Tensor) -> Tensor:
    """Each token's prediction error after the tokens before it: the delta rule's solve."""
    if phi.shape[-2] == 1:
        return residual
    overlap = torch.tril(phi @ phi.transpose(-1, -2), -1) * eta.transpose(-1, -2)
    return torch.linalg.solve_triangular(overlap, residual, upper=False, unitriangular=True)
