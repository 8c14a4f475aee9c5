"""What one row of a hierarchical cache computes, written from `docs/semantics.md` alone.

Naive on purpose: float64, token by token, head by head, everything that ever arrived is kept, and
inner gradients come from autograd. It can be checked against the page line by line.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, softplus

from ttt_cache import HierarchicalCache

EPS = 1e-6
Weights = dict[str, Tensor]
Pair = tuple[Tensor, Tensor]
Virtual = tuple[Tensor, Tensor, float]  # key, value and what is added to the score


def unit(z: Tensor) -> Tensor:
    return z / torch.sqrt((z**2).sum() + EPS)


def rms(z: Tensor) -> Tensor:
    return z / torch.sqrt((z**2).mean() + EPS)


def soft(z: Tensor) -> Tensor:
    return z / torch.sqrt((z**2).mean() + 0.01)


def rotate(z: Tensor, position: int) -> Tensor:
    """RoPE of one vector: pair (2i, 2i + 1) is turned by position * 10000^(-2i / D)."""
    turned = []
    for i in range(0, len(z), 2):
        angle = position * 10000 ** (-i / len(z))
        cos, sin = math.cos(angle), math.sin(angle)
        turned += [z[i] * cos - z[i + 1] * sin, z[i] * sin + z[i + 1] * cos]
    return torch.stack(turned)


@dataclass
class Token:
    """One executed step."""

    keys: Tensor  # [Hkv, D], before RoPE
    turned_keys: list[Tensor]  # per key head, after RoPE at the token's position
    values: Tensor  # [Hkv, D]
    source: Tensor | None = None  # s, what the networks learn from


def mean_of(members: list[Token], key_head: int) -> Pair:
    keys = torch.stack([token.keys[key_head] for token in members])
    values = torch.stack([token.values[key_head] for token in members])
    return keys.mean(0), values.mean(0)


class MeanMemory:
    """One virtual token: the means of the keys before RoPE and of the values."""

    def __init__(self, weights: Weights, config: Any) -> None:
        self.config = config
        self.members: list[Token] = []
        self.unfinished: list[Token] = []

    def take(self, token: Token) -> None:
        self.unfinished.append(token)
        if len(self.unfinished) == self.config.chunk:
            for each in self.unfinished:
                self.join(each)
            self.unfinished = []

    def join(self, token: Token) -> None:
        self.members.append(token)

    def virtual(self, key_head: int) -> list[Virtual]:
        return [(*mean_of(self.members, key_head), 0.0)]


class ClusterMemory(MeanMemory):
    """Sequential k-means per key head: one virtual token per cluster that has members."""

    def __init__(self, weights: Weights, config: Any) -> None:
        super().__init__(weights, config)
        self.clusters: dict[int, list[list[Token]]] = {}  # per key head, the members of each

    def join(self, token: Token) -> None:
        for key_head, key in enumerate(token.keys):
            clusters = self.clusters.setdefault(key_head, [])
            means = [mean_of(members, key_head)[0] for members in clusters]
            squares = [((key - mean) ** 2).sum() for mean in means]
            squares += [torch.zeros(())] * (self.config.virtual - len(clusters))  # without members
            nearest = min(squares) + 1e-4 * (key**2).sum()
            lowest = next(j for j, square in enumerate(squares) if square <= nearest)
            if lowest == len(clusters):
                clusters.append([])
            clusters[lowest].append(token)

    def virtual(self, key_head: int) -> list[Virtual]:
        clusters = self.clusters[key_head]
        return [(*mean_of(each, key_head), math.log(len(each))) for each in clusters]


class RandomMemory:
    """M fixed vectors, turned into virtual keys and values."""

    def __init__(self, weights: Weights, config: Any) -> None:
        self.weights = weights

    def take(self, token: Token) -> None:
        """Nothing is learned."""

    def read(self) -> list[Tensor]:
        """The read-outs r_m, M vectors of width E."""
        return list(self.weights["memory.latents"])

    def virtual(self, key_head: int) -> list[Virtual]:
        w_k = self.weights["reader.to_key"][key_head]  # [D, E]
        w_v = self.weights["reader.to_value"][key_head]  # [E, D]
        slot_key = self.weights["reader.slot_key"][key_head]  # [D, M]
        return [(w_k @ r + slot_key[:, m], r @ w_v, 0.0) for m, r in enumerate(self.read())]


class Network:
    """The network of one memory head: W1 (and W2), if any, and F."""

    def __init__(self, layers: list[Tensor], rho: Tensor) -> None:
        self.first, self.layers, self.rho = layers, layers, rho
        self.sums = [torch.zeros_like(w) for w in layers[:-1]]  # G_l

    def features(self, k: Tensor, before_last: list[Tensor]) -> Tensor:
        for w in before_last:
            k = unit(gelu(k @ w, approximate="tanh"))
        return k

    def answer(self, k: Tensor) -> Tensor:
        *before_last, last = self.layers
        return soft(self.features(k, before_last) @ last)

    def learn(self, k: Tensor, v: Tensor, eta: Tensor) -> None:
        """One token."""
        *before_last, last = self.layers
        if before_last:
            with torch.enable_grad():
                at = [w.clone().requires_grad_() for w in before_last]
                loss = ((v - self.features(k, at) @ last) ** 2).sum() / 2
                gradients = torch.autograd.grad(loss, at)
            self.sums = [total + g for total, g in zip(self.sums, gradients, strict=True)]
        phi = self.features(k, before_last)
        last = last + eta * torch.outer(phi, v - phi @ last)
        self.layers = [*before_last, last]

    def close(self, chunk: int) -> None:
        """The end of a chunk."""
        *before_last, last = self.layers
        for layer, w in enumerate(before_last):
            g = self.sums[layer] / chunk
            w = w - torch.sigmoid(self.rho[layer]) * g / torch.sqrt(1 + (g**2).sum())
            for j, first in enumerate(self.first[layer].T):
                w[:, j] *= first.norm() / torch.sqrt((w[:, j] ** 2).sum() + EPS)
            before_last[layer] = w
        rows, d = last.shape
        cap = math.sqrt(rows * d) / math.sqrt((last**2).sum() + EPS)
        self.layers = [*before_last, last * min(1.0, cap)]
        self.sums = [torch.zeros_like(g) for g in self.sums]


class TTTMemory(RandomMemory):
    """`ttt-linear` and `ttt-mlp`: a network per memory head, trained on every token."""

    def __init__(self, weights: Weights, config: Any) -> None:
        super().__init__(weights, config)
        self.heads, self.d, self.chunk = config.memory_heads, config.memory_dim, config.chunk
        depth = 1 if config.memory == "ttt-linear" else config.depth
        layers = [weights[f"memory.fast.w{layer + 1}"] for layer in range(depth)]
        rho = weights["memory.fast.step_size"] if depth > 1 else torch.empty(0, self.heads)
        self.running = [Network([w[i] for w in layers], rho[:, i]) for i in range(self.heads)]
        self.newest, self.taken = deepcopy(self.running), 0

    def take(self, token: Token) -> None:
        for head, network in enumerate(self.running):
            network.learn(*self.inputs(token.source, head))
        self.taken += 1
        if self.taken % self.chunk == 0:
            for network in self.running:
                network.close(self.chunk)
            self.newest = deepcopy(self.running)

    def inputs(self, source: Tensor, head: int) -> tuple[Tensor, Tensor, Tensor]:
        """Key, value and rate of one token for one memory head: [K | V | w] = s P."""
        sizes = [self.heads * self.d, self.heads * self.d, self.heads]
        k, v, w = (source @ self.weights["memory.project"]).split(sizes)
        eta = torch.sigmoid(w[head] + self.weights["memory.rate"][head])
        k, v = (z.view(self.heads, self.d)[head] for z in (k, v))
        return unit(k), rms(v), eta

    def read(self) -> list[Tensor]:
        answers = []
        for slots, net in zip(self.weights["memory.slot_query"], self.newest, strict=True):
            answers.append(torch.stack([net.answer(unit(slot)) for slot in slots]))  # [M, d]
        return list(torch.cat(answers, dim=1))

    def ask(self, asking: Tensor, networks: list[Network]) -> Tensor:
        """P_memory of all heads as the answer to a token's own query, `[H D]`."""
        queries = (asking @ self.weights["reader.project"]).view(self.heads, self.d)
        r = [net.answer(unit(query)) for net, query in zip(networks, queries, strict=True)]
        return torch.cat(r) @ self.weights["reader.to_output"]


MEMORIES = {"mean": MeanMemory, "cluster": ClusterMemory, "random": RandomMemory}
MEMORIES |= {"ttt-linear": TTTMemory, "ttt-mlp": TTTMemory}


class Oracle:
    """One row. `push` takes one token, `q [H, D]`, `k, v [Hkv, D]`, `x [dim]`; returns `[H, D]`."""

    def __init__(self, cache: HierarchicalCache) -> None:
        self.config = config = cache.config
        self.weights = {name: tensor.double() for name, tensor in cache.state_dict().items()}
        self.recent, self.sinks = int(config.recent), config.sinks
        self.chunk = 1 if config.memory == "none" else config.chunk
        self.arrived = config.write == "arrived"
        self.window = self.recent + (0 if self.arrived else self.chunk - 1)  # W
        self.group = cache.num_heads // cache.kv_heads
        self.rotate = rotate if cache.rope is not None else lambda z, position: z
        self.kind = MEMORIES.get(config.memory)
        self.reset()

    def reset(self) -> None:
        self.tokens: list[Token] = []
        self.memory: Any = self.kind(self.weights, self.config) if self.kind else None

    @property
    def taken(self) -> int:
        """f, the tokens that the memory has taken in."""
        return len(self.tokens) if self.arrived else max(0, len(self.tokens) - self.recent)

    @property
    def evicted(self) -> int:
        """e, the tokens that have left the window."""
        if self.arrived:
            return max(0, len(self.tokens) - self.recent)
        return self.chunk * (self.taken // self.chunk)

    @property
    def written(self) -> bool:
        if self.memory is None or self.config.reset_memory:
            return False
        return self.taken >= self.chunk or (self.config.read == "query" and self.arrived)

    def push(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        q, k, v, x = (z.detach().double() for z in (q, k, v, x))
        taken, position = self.taken, len(self.tokens)
        token = Token(k, [self.rotate(key, position) for key in k], v)
        self.tokens.append(token)
        # Without a window there is no P_recent, and nobody asks for it.
        recent = self.attended(self.exact_tokens, q) if self.recent else q.new_empty(0)
        token.source, asking = {
            "hidden": (x, x),
            "kv": (torch.cat([k.flatten(), v.flatten()]), q.flatten()),
            "output": (recent.flatten(), recent.flatten()),
        }[self.config.source]
        if self.memory and self.taken > taken:
            self.memory.take(self.tokens[self.taken - 1])
        if not self.written:
            return recent
        if self.config.read == "query":
            networks = self.memory.running if self.arrived else self.memory.newest
            memory = self.memory.ask(asking, networks).view_as(q)
        else:
            memory = self.attended(self.virtual_tokens, q)
        if self.recent == 0:
            return memory
        return torch.stack([self.gated(i, q[i], recent[i], memory[i]) for i in range(len(q))])

    def exact_tokens(self, head: int, q: Tensor) -> Pair:
        """Scores and values of the window and the sinks, for a query before RoPE."""
        turned_q = self.rotate(q, len(self.tokens) - 1)
        scores, values, key_head = [], [], head // self.group
        for token in self.tokens[self.evicted :]:
            scores.append(turned_q @ token.turned_keys[key_head])
            values.append(token.values[key_head])
        for j in range(1, min(self.sinks, self.evicted) + 1):
            sink = self.tokens[j - 1]
            distance = self.window + self.sinks - j
            scores.append(q @ self.rotate(sink.keys[key_head], -distance))
            values.append(sink.values[key_head])
        return torch.stack(scores) / math.sqrt(len(q)), torch.stack(values)

    def attended(self, tokens: Callable[[int, Tensor], Pair], q: Tensor) -> Tensor:
        """The output of all heads of one softmax over these tokens, `[H, D]`."""
        both = [tokens(head, query) for head, query in enumerate(q)]
        return torch.stack([torch.softmax(scores, 0) @ values for scores, values in both])

    def virtual_tokens(self, head: int, q: Tensor) -> Pair:
        """Scores and values of the virtual tokens; their keys have no position."""
        tokens = self.memory.virtual(head // self.group)
        scores = []
        for m, (key, _, term) in enumerate(tokens, 1):
            scores.append(q @ key / math.sqrt(len(q)) + term + self.position(head, m))
        return torch.stack(scores), torch.stack([value for _, value, _ in tokens])

    def position(self, head: int, m: int) -> Tensor | float:
        """What `position` adds to the score of slot m, counted from 1, the oldest."""
        if self.config.position == "slot":
            return self.weights["reader.slot_bias"][head, m - 1]
        if self.config.position == "decay":
            return -softplus(self.weights["reader.decay"][head]) * (self.config.virtual - m)
        return 0.0

    def gated(self, head: int, q: Tensor, recent: Tensor, memory: Tensor) -> Tensor:
        gate = self.config.gate
        if gate == "fixed":
            return self.config.alpha * recent + (1 - self.config.alpha) * memory
        bias = self.weights["gate.bias"][0 if gate == "layer" else head]
        if gate == "joint":
            scores, values = self.exact_tokens(head, q)
            virtual_scores, virtual_values = self.virtual_tokens(head, q)
            both = torch.softmax(torch.cat([scores, virtual_scores + bias]), 0)
            return both @ torch.cat([values, virtual_values])
        if gate == "residual":
            return recent + torch.tanh(bias) * memory
        logit = bias + (self.weights["gate.weight"][head] @ q if gate == "query" else 0)
        return torch.sigmoid(logit) * recent + (1 - torch.sigmoid(logit)) * memory
