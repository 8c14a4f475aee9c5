"""What one row of a hierarchical cache computes, written from `docs/semantics.md` alone.

Naive on purpose: float64, token by token, head by head, everything that ever arrived is kept, and
W1's gradient comes from autograd. Readers should be able to check it against the page line by line.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu

from ttt_cache import HierarchicalCache

EPS = 1e-6


def unit(z: Tensor) -> Tensor:
    return z / torch.sqrt((z**2).sum() + EPS)


def rms(z: Tensor) -> Tensor:
    return z / torch.sqrt((z**2).mean() + EPS)


def rotate(z: Tensor, position: int) -> Tensor:
    """RoPE of one vector: pair (2i, 2i + 1) is turned by position * 10000^(-2i / D)."""
    turned = []
    for i in range(0, len(z), 2):
        angle = position * 10000 ** (-i / len(z))
        cos, sin = math.cos(angle), math.sin(angle)
        turned += [z[i] * cos - z[i + 1] * sin, z[i] * sin + z[i + 1] * cos]
    return torch.stack(turned)


class Token(NamedTuple):
    """One executed step."""

    keys: Tensor  # [Hkv, D], before RoPE
    turned_keys: list[Tensor]  # per key head, after RoPE at the token's position
    values: Tensor  # [Hkv, D]
    hidden: Tensor  # [dim]


class MeanMemory:
    """One virtual token: the means of the evicted keys before RoPE and of the evicted values."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.evicted: list[Token] = []

    def take(self, chunk: list[Token]) -> None:
        self.evicted += chunk

    def virtual(self, key_head: int) -> list[tuple[Tensor, Tensor]]:
        keys = [token.keys[key_head] for token in self.evicted]
        values = [token.values[key_head] for token in self.evicted]
        return [(sum(keys) / len(keys), sum(values) / len(values))]


class RandomMemory:
    """M fixed vectors, turned into virtual keys and values."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def take(self, chunk: list[Token]) -> None:
        """Nothing is learned."""

    def read(self) -> list[Tensor]:
        """The read-outs r_m, M vectors of width E."""
        return list(self.weights["memory.latents"])

    def virtual(self, key_head: int) -> list[tuple[Tensor, Tensor]]:
        w_k = self.weights["memory.to_key"][key_head]  # [D, E]
        w_v = self.weights["memory.to_value"][key_head]  # [E, D]
        slot_key = self.weights["memory.slot_key"][key_head]  # [D, M]
        return [(w_k @ r + slot_key[:, m], r @ w_v) for m, r in enumerate(self.read())]


class MLPMemory(RandomMemory):
    """Per memory head, W1 `[d, n]` and W2 `[n, d]`, trained on every evicted token."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__(weights)
        self.w1_0 = weights["memory.fast.w1"]
        self.fast = list(zip(self.w1_0, weights["memory.fast.w2"], strict=True))
        self.heads, self.d, self.n = self.w1_0.shape

    def take(self, chunk: list[Token]) -> None:
        self.fast = [self.updated(i, *self.fast[i], chunk) for i in range(self.heads)]

    def features(self, k: Tensor, w1: Tensor) -> Tensor:
        return unit(gelu(k @ w1, approximate="tanh"))

    def inputs(self, x: Tensor, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """Key, value and rate of one token for one memory head: [K | V | w] = x P."""
        sizes = [self.heads * self.d, self.heads * self.d, self.heads]
        k, v, w = (x @ self.weights["memory.project"]).split(sizes)
        mine = slice(head * self.d, (head + 1) * self.d)
        return unit(k[mine]), rms(v[mine]), torch.sigmoid(w + self.weights["memory.rate"])[head]

    def updated(self, head: int, w1: Tensor, w2: Tensor, chunk: list[Token]) -> tuple:
        total = torch.zeros_like(w1)
        for token in chunk:
            k, v, eta = self.inputs(token.hidden, head)
            at = w1.clone().requires_grad_()
            loss = ((v - self.features(k, at) @ w2) ** 2).sum() / 2
            total = total + torch.autograd.grad(loss, at)[0]
            phi = self.features(k, w1)
            w2 = w2 + eta * torch.outer(phi, v - phi @ w2)
        mean = total / len(chunk)
        rate = torch.sigmoid(self.weights["memory.fast.step_size"][head])
        w1 = w1 - rate * mean / torch.sqrt(1 + (mean**2).sum())
        for j, first in enumerate(self.w1_0[head].T):
            w1[:, j] *= first.norm() / torch.sqrt((w1[:, j] ** 2).sum() + EPS)
        cap = math.sqrt(self.n * self.d) / math.sqrt((w2**2).sum() + EPS)
        return w1, w2 * min(1.0, cap)

    def read(self) -> list[Tensor]:
        per_head = []
        for slots, (w1, w2) in zip(self.weights["memory.slot_query"], self.fast, strict=True):
            per_head.append([rms(self.features(unit(slot), w1) @ w2) for slot in slots])
        return [torch.cat(parts) for parts in zip(*per_head, strict=True)]


MEMORIES = {"ttt-mlp": MLPMemory, "random": RandomMemory, "mean": MeanMemory}


class Oracle:
    """One row. `push` takes one token, `q [H, D]`, `k, v [Hkv, D]`, `x [dim]`; returns `[H, D]`."""

    def __init__(self, cache: HierarchicalCache) -> None:
        config = cache.config
        self.weights = {name: tensor.double() for name, tensor in cache.state_dict().items()}
        self.recent, self.sinks = int(config.recent), config.sinks
        self.chunk = 1 if config.memory == "none" else config.chunk
        self.group = cache.num_heads // cache.kv_heads
        self.gate, self.alpha = config.gate, config.alpha
        self.rotate = rotate if cache.rope is not None else lambda z, position: z
        self.kind = MEMORIES.get(config.memory)
        self.reset()

    def reset(self) -> None:
        self.tokens: list[Token] = []
        self.memory: Any = self.kind(self.weights) if self.kind else None

    @property
    def evicted(self) -> int:
        return self.chunk * (max(0, len(self.tokens) - self.recent) // self.chunk)

    def push(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        q, k, v, x = (z.detach().double() for z in (q, k, v, x))
        evicted = self.evicted
        turned = [self.rotate(key, len(self.tokens)) for key in k]
        self.tokens.append(Token(k, turned, v, x))
        if self.memory and self.evicted > evicted:
            self.memory.take(self.tokens[evicted : self.evicted])
        return torch.stack([self.answer(head, query) for head, query in enumerate(q)])

    def exact_tokens(self, head: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and values of the window and the sinks, for a query before RoPE."""
        turned_q = self.rotate(q, len(self.tokens) - 1)
        scores, values, key_head = [], [], head // self.group
        for token in self.tokens[self.evicted :]:
            scores.append(turned_q @ token.turned_keys[key_head])
            values.append(token.values[key_head])
        for j in range(1, min(self.sinks, self.evicted) + 1):
            sink = self.tokens[j - 1]
            distance = self.recent + self.chunk - 1 + self.sinks - j
            scores.append(q @ self.rotate(sink.keys[key_head], -distance))
            values.append(sink.values[key_head])
        return torch.stack(scores) / math.sqrt(len(q)), torch.stack(values)

    def virtual_tokens(self, head: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and values of the virtual tokens; their keys have no position."""
        keys, values = zip(*self.memory.virtual(head // self.group), strict=True)
        return torch.stack([q @ key for key in keys]) / math.sqrt(len(q)), torch.stack(values)

    def answer(self, head: int, q: Tensor) -> Tensor:
        scores, values = self.exact_tokens(head, q)
        recent = torch.softmax(scores, 0) @ values
        if not self.memory or self.evicted == 0:
            return recent
        virtual_scores, virtual_values = self.virtual_tokens(head, q)
        virtual = torch.softmax(virtual_scores, 0) @ virtual_values
        if self.gate == "fixed":
            return self.alpha * recent + (1 - self.alpha) * virtual
        bias = self.weights["gate.bias"][0 if self.gate == "layer" else head]
        if self.gate == "joint":
            both = torch.softmax(torch.cat([scores, virtual_scores + bias]), 0)
            return both @ torch.cat([values, virtual_values])
        if self.gate == "residual":
            return recent + torch.tanh(bias) * virtual
        logit = bias + (self.weights["gate.weight"][head] @ q if self.gate == "query" else 0)
        return torch.sigmoid(logit) * recent + (1 - torch.sigmoid(logit)) * virtual
