"""TTT-Linear and TTT-MLP: a network per row, trained by one step of gradient descent per token.

After "Learning to (Learn at Test Time)" (arXiv 2407.04620, section 2) with normalised steps: the
last layer follows the delta rule (arXiv 2406.06484, equation 1; its chunk form is the triangular
solve of section 3 there) on features of unit length, and the layers before it make one bounded step
per chunk. `docs/semantics.md` has the equations and the argument that the weights stay bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import chunks, delta, network
from .base import Frames, Memory, MemoryState, by_column
from .delta import Chunk, Rule
from .network import READ_EPS, FastWeights, rms_norm, unit

LARGEST = 1e15  # of a projected feature: its square still fits float32


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
        project = torch.randn(width_in, self.width, **factory) / width_in**0.5
        self.project = nn.Parameter(by_column(project))
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

    def take(self, state: MemoryState, token: Tensor) -> None:
        chunk = Chunk(*(z.flatten(0, 1) for z in self._prepared(token[:, None])))
        added = delta.learn_one(chunk, *self._networks(state))
        rows = (token.shape[0], self.heads)
        names = (*map(_grad, self.fast.hidden), self.fast.last)
        for name, (a, b) in zip(names, added, strict=True):
            a, b = a.transpose(-1, -2).unflatten(0, rows), b.unflatten(0, rows)
            state[name].addcmul_(a, b)

    def close(self, state: MemoryState) -> None:
        rows = (state[self.fast.last].shape[0], self.heads)
        closed = delta.close(*self._networks(state), self._totals(state), self._rule(rows[0]))
        for name, weight in self._state(*closed, rows).items():
            state[name].copy_(weight)
        for name in self.fast.hidden:
            state[_grad(name)].zero_()

    def scan(
        self,
        state: MemoryState,
        tokens: Tensor,
        valid: Tensor,
        closes: Tensor,
        run: Callable[[chunks.Given], chunks.Versions] = chunks.run,
    ) -> tuple[MemoryState, MemoryState]:
        rows = (tokens.shape[0], self.heads)
        chunk, (hidden, last) = self._by_chunk(tokens, valid), self._networks(state)
        ends = closes.t().repeat_interleave(self.heads, dim=1)[..., None, None]
        given = chunks.Given(chunk, hidden, last, self._totals(state), self._rule(rows[0]), ends)
        found = run(given)
        hidden, last, totals = found.end
        new = self._state(hidden, last, rows)
        for name, total in zip(self.fast.hidden, totals, strict=True):
            new[_grad(name)] = total.unflatten(0, rows)
        return self._state(found.hidden, found.last, rows), new

    def running(
        self, before: MemoryState, tokens: Tensor, valid: Tensor, queries: Tensor
    ) -> Tensor:
        """What each token's query finds after that token.

        Args:
            before: the weights before each chunk, `[K, B, *]`.
            tokens, valid: as for `scan`.
            queries: unit vectors `[K, B, h, C, d]`, one for each token.

        Returns:
            `[K, B, C, E]`.
        """
        flat = {name: w.flatten(0, 1) for name, w in before.items()}
        chunk, (hidden, last) = self._by_chunk(tokens, valid), self._networks(flat)
        chunk = Chunk(*(z.flatten(0, 1) for z in chunk))
        _, learned, error = delta.predict(chunk, hidden, last)
        phi = network.features(queries.flatten(0, 2), hidden)
        seen = torch.tril(phi @ learned.transpose(-1, -2))
        answers = phi @ last + seen @ (chunk.eta * error)
        return self._by_token(answers.unflatten(0, queries.shape[:3]))

    def answer(self, state: MemoryState, queries: Tensor) -> Tensor:
        """Put unit queries `[*, h, L, d]` through networks `[*, h, rows, columns]`: `[*, L, E]`."""
        return self._by_token(
            network.features(queries, self._hidden(state)) @ state[self.fast.last]
        )

    def read(self, state: MemoryState, batch_size: int) -> Tensor:
        if self.has_slots:
            return self.answer(state, unit(self.slot_query.to(self.fast.dtype)))
        weights = [state[name].flatten(1) for name in self.fast.layers]
        return torch.cat(weights, dim=1) if self.publishes else weights[0][:, :0]

    def published(self, readout: Tensor) -> MemoryState:
        """The weights of a version from its read-out, where there are no slots."""
        layers = self.fast.layers
        parts = readout.split([w.numel() for w in layers.values()], dim=1)
        return {n: p.unflatten(1, w.shape) for p, (n, w) in zip(parts, layers.items(), strict=True)}

    def finite(self, vectors: Tensor) -> Tensor:
        """Wide, and finite: a float16 projection may overflow, which the norms would make NaN."""
        return vectors.to(self.fast.dtype).clamp(-LARGEST, LARGEST)

    def split_heads(self, vectors: Tensor) -> Tensor:
        """One part per memory head: `[B, L, E]` -> `[B, h, L, d]`."""
        return vectors.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _prepared(self, tokens: Tensor) -> Chunk:
        """What is learned of tokens `[B, L, F]`: keys, values and rates, `[B, h, L, *]`."""
        both = self.heads * self.head_dim
        parts = self.finite(tokens).split([both, both, self.heads], dim=-1)
        k, v, rate = map(self.split_heads, parts)
        # In double: CPUs round those that fill a vector otherwise than the rest, and what a row
        # learns must not depend on how many others learn at the same time.
        eta = torch.sigmoid((rate + self.rate.to(rate.dtype)[:, None, None]).double())
        return Chunk(unit(k), rms_norm(v), eta.to(rate.dtype))

    def _by_chunk(self, tokens: Tensor, valid: Tensor) -> Chunk:
        """The same of `[B, K, C, F]`, by chunk: `[K, B * h, C, *]`."""
        # A token of zeros has k = v = phi = 0: it changes nothing.
        tokens = tokens.masked_fill(~valid[..., None], 0)
        parts = (z.unflatten(2, tokens.shape[1:3]) for z in self._prepared(tokens.flatten(1, 2)))
        return Chunk(*(z.permute(2, 0, 1, 3, 4).flatten(1, 2) for z in parts))

    def _by_token(self, answers: Tensor) -> Tensor:
        """The normed answers of all heads side by side: `[*, h, L, d]` -> `[*, L, E]`."""
        return rms_norm(answers, READ_EPS).transpose(-3, -2).flatten(-2)

    def _hidden(self, state: MemoryState) -> list[Tensor]:
        return [state[name] for name in self.fast.hidden]

    def _networks(self, state: MemoryState) -> tuple[list[Tensor], Tensor]:
        """Hidden layers and last layer of all rows' heads, `[B * h, rows, columns]`."""
        return [w.flatten(0, 1) for w in self._hidden(state)], state[self.fast.last].flatten(0, 1)

    def _totals(self, state: MemoryState) -> list[Tensor]:
        return [state[_grad(name)].flatten(0, 1) for name in self.fast.hidden]

    def _state(self, hidden: list[Tensor], last: Tensor, rows: tuple[int, int]) -> MemoryState:
        """Weights of networks `[*, B * h, rows, columns]` by name, `[*, B, h, rows, columns]`."""
        weights = zip((*self.fast.hidden, self.fast.last), (*hidden, last), strict=True)
        return {name: w.unflatten(-3, rows) for name, w in weights}

    def _rule(self, batch: int) -> Rule:
        """How chunks close, for networks of so many rows."""
        starts = [getattr(self.fast, name) for name in self.fast.hidden]
        norms = [torch.linalg.vector_norm(start, dim=-2, keepdim=True) for start in starts]
        sizes = self.fast.step_size.unbind() if starts else ()
        rates = [torch.sigmoid(size)[:, None, None] for size in sizes]
        rates, norms = ([z.repeat(batch, 1, 1) for z in each] for each in (rates, norms))
        return Rule(self.chunk, self.cap, rates, norms)


def _grad(name: str) -> str:
    """Where the gradient so far of a layer stands in the state: `w1` -> `grad1`."""
    return name.replace("w", "grad")
