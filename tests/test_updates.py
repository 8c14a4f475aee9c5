"""The memory's inner updates against explicit loops, a public reference and the published rule."""

import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import Case, Tokens, assert_near
from torch import Tensor
from torch.nn.functional import gelu

from ttt_cache import CacheConfig, HierarchicalCache

CHUNKS = [1, 2, 5, 16]
SETTINGS = {"heads": st.integers(1, 3), "length": st.integers(1, 40), "seed": st.integers(0, 9999)}
CHOICES = {"d": [2, 4, 6], "chunk": CHUNKS, "scale": [0.0, 0.3, 3.0], "rate": [-3.0, 0.0, 3.0]}
SETTINGS |= {name: st.sampled_from(values) for name, values in CHOICES.items()}
Drawn = tuple[Tensor, ...]
Layers = list[Tensor]  # W1, .., F


def unit(z: Tensor) -> Tensor:
    return z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def rms(z: Tensor, eps: float = 1e-6) -> Tensor:
    return z / (z.square().mean(-1, keepdim=True) + eps).sqrt()


@torch.no_grad()
def bare(heads: int, d: int, chunk: int, scale=0.0, seed=0, **kind: object) -> HierarchicalCache:
    """Nothing but a memory: hidden states are [K | V | w | Q]; F starts at `scale` times normal."""
    size = {"chunk": chunk, "memory_heads": heads, "memory_dim": d}
    config = CacheConfig(recent=0, read="query", write="arrived", **size, **kind)
    dim = heads * (3 * d + 1)
    cache = Case(config, heads, heads, d, dim, turns=False, seed=seed).build_stirred()
    weights = cache.state_dict()
    weights["memory.project"].copy_(torch.eye(dim)[:, : -heads * d])
    weights["memory.rate"].zero_()
    weights["reader.project"].copy_(torch.eye(dim)[:, -heads * d :])
    weights["reader.to_output"].copy_(torch.eye(heads * d))
    layers_in(weights, "memory.fast.")[-1].mul_(scale)
    return cache


def layers_in(tensors: dict[str, Tensor], prefix: str = "") -> Layers:
    return [tensors[name] for n in (1, 2, 3) if (name := f"{prefix}w{n}") in tensors]


def draw(heads: int, d: int, length: int, rate: float) -> Drawn:
    """Keys, values `[heads, length, d]`, logits of rates `[heads, length, 1]` and queries."""
    k, v, q = torch.randn(3, heads, length, d, dtype=torch.float64)
    return k, v, torch.randn_like(k[..., :1]) + rate, q


def learned(k: Tensor, v: Tensor, w: Tensor, q: Tensor) -> list[list[Drawn]]:
    """What the page makes of these: for each head, for each token, a key, a value and a rate."""
    heads = zip(unit(k), rms(v), torch.sigmoid(w), strict=True)
    return [list(zip(*head, strict=True)) for head in heads]


def answers(cache: HierarchicalCache, drawn: Drawn) -> Iterator[tuple[Tensor, Layers]]:
    """Outputs `[heads, length, d]` and last weights: fed token by token, then all at once."""
    x = torch.cat([z.transpose(0, 1).flatten(1) for z in drawn], dim=1)
    plain = torch.zeros_like(drawn[0])[None]
    tokens, state = Tokens(plain, plain, plain, x[None]), cache.init_state(1)
    streamed = [cache.stream(*token, state) for token in tokens.split([1] * tokens.length)]
    yield torch.cat(streamed, dim=2)[0], [w[0] for w in layers_in(state.memory)]
    y, state = cache(*tokens)
    yield y[0].detach(), [w[0].detach() for w in layers_in(state.memory)]


def capped(f: Tensor) -> Tensor:
    """F, shortened to the norm of a full memory."""
    return f * min(1.0, math.sqrt(f.numel()) / math.sqrt(f.square().sum() + 1e-6))


def delta_rule(f: Tensor, chunk: int, tokens: list[Drawn]) -> Iterator[Layers]:
    """The delta rule (arXiv 2406.06484), and a cap at each chunk's end: F after each token."""
    for t, (k, v, eta) in enumerate(tokens, 1):
        f = f - eta * torch.outer(k, k @ f - v)
        f = capped(f) if t % chunk == 0 else f
        yield [f]


def published(f: Tensor, size: int, tokens: list[Drawn]) -> Iterator[Layers]:
    """Mini-batch TTT (arXiv 2407.04620, section 2.4) of a linear model without norm and residual:
    all gradients of a mini-batch, of |k W - v|^2 / 2, are taken at its first weights."""
    first = f
    for t, (k, v, eta) in enumerate(tokens):
        first = f if t % size == 0 else first
        f = f - eta * torch.outer(k, k @ first - v)
        yield [f]


def predict(k: Tensor, layers: Layers) -> Tensor:
    for w in layers[:-1]:
        k = unit(gelu(k @ w, approximate="tanh"))
    return k @ layers[-1]


def mlp(first: Layers, rho: Tensor, chunk: int, tokens: list[Drawn]) -> Iterator[Layers]:
    """F steps with every token; the layers before it at the end of a chunk, which caps F."""
    layers, sums = first, [torch.zeros_like(w) for w in first[:-1]]
    for t, (k, v, eta) in enumerate(tokens, 1):
        at = [w.clone().requires_grad_() for w in layers]
        loss = (predict(k, at) - v).square().sum() / 2
        *gradients, gradient = torch.autograd.grad(loss, at)
        sums = [total + g for total, g in zip(sums, gradients, strict=True)]
        layers = [*layers[:-1], layers[-1] - eta * gradient]
        if t % chunk == 0:
            for n, g in enumerate(total / chunk for total in sums):
                w = layers[n] - torch.sigmoid(rho[n]) * g / (1 + g.square().sum()).sqrt()
                layers[n] = w * first[n].norm(dim=0) / (w.square().sum(0) + 1e-6).sqrt()
            layers, sums = [*layers[:-1], capped(layers[-1])], [torch.zeros_like(w) for w in sums]
        yield layers


def compare(cache: HierarchicalCache, drawn: Drawn, loops: list[list[Layers]]) -> None:
    """Both forms against the loops, one per head."""
    expected = []
    for q, loop in zip(unit(drawn[-1]), loops, strict=True):
        read = [predict(query, layers) for query, layers in zip(q, loop, strict=True)]
        expected.append(rms(torch.stack(read), 0.01))
    for y, layers in answers(cache, drawn):
        assert_near(y, torch.stack(expected), 1e-10)
        for n, w in enumerate(layers):
            assert_near(w, torch.stack([loop[-1][n] for loop in loops]), 1e-10)


@given(**SETTINGS)
def test_ttt_linear_is_the_delta_rule(heads, d, chunk, length, scale, rate, seed):
    cache = bare(heads, d, chunk, scale, seed, memory="ttt-linear")
    first, drawn = cache.state_dict()["memory.fast.w1"], draw(heads, d, length, rate)
    each = zip(first, learned(*drawn), strict=True)
    compare(cache, drawn, [list(delta_rule(f, chunk, tokens)) for f, tokens in each])


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("bites", "scale", "rate"), [(True, 5.0, 3.0), (False, 0.0, -3.0)])
def test_the_cap_of_ttt_linear(chunk, bites, scale, rate):
    cache, drawn = bare(1, 4, chunk, scale, memory="ttt-linear"), draw(1, 4, 40, rate)
    (first,), (tokens,) = cache.state_dict()["memory.fast.w1"], learned(*drawn)
    loop, uncapped = (list(delta_rule(first, size, tokens)) for size in (chunk, 99))
    assert torch.equal(loop[-1][0], uncapped[-1][0]) != bites
    compare(cache, drawn, [loop])


@pytest.mark.parametrize("depth", [2, 3])
@given(**SETTINGS, n=st.integers(8, 12))  # fewer may magnify rounding, see docs/semantics.md
def test_ttt_mlp_is_its_loop(depth, heads, d, chunk, length, scale, rate, seed, n):
    cache = bare(heads, d, chunk, scale, seed, memory="ttt-mlp", hidden_dim=n, depth=depth)
    drawn, weights, loops = draw(heads, d, length, rate), cache.state_dict(), []
    for head, tokens in enumerate(learned(*drawn)):
        first = [w[head] for w in layers_in(weights, "memory.fast.")]
        loops.append(list(mlp(first, weights["memory.fast.step_size"][:, head], chunk, tokens)))
    compare(cache, drawn, loops)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_ttt_linear_is_the_public_delta_rule(chunk):
    """That of flash-linear-attention, in float32; nothing is capped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it misses a GPU
        from fla.ops.delta_rule.naive import delta_rule_recurrence
    cache, drawn = bare(2, 8, chunk, memory="ttt-linear"), draw(2, 8, 40, -1.0)
    k, v, w, q = (z[None] for z in drawn)
    inputs = unit(q) * math.sqrt(8), unit(k), rms(v), torch.sigmoid(w)  # it divides q by sqrt(8)
    outputs, f = delta_rule_recurrence(*inputs)
    for t in range(1, 41):  # the cap is 8
        assert delta_rule_recurrence(*(z[:, :, :t] for z in inputs))[1].norm(dim=(2, 3)).max() < 7.9
    for y, (own,) in answers(cache, drawn):
        assert_near(y, rms(outputs[0], 0.01), 1e-5)
        assert_near(own, f[0].double(), 1e-5)


@pytest.mark.parametrize("keys", ["any", "orthogonal", "repeated"])
@pytest.mark.parametrize("size", [1, 8])
def test_beside_the_published_mini_batch(keys, size):
    """Equal for mini-batches of one token; longer ones add up the steps of keys that repeat."""
    cache = bare(1, 8, 16, memory="ttt-linear")  # nothing is capped before 16 tokens
    k, v, w, q = draw(1, 8, 8, 3.0)
    k = torch.linalg.qr(k)[0] if keys == "orthogonal" else k
    k, v = (z[:, :1].expand_as(z) if keys == "repeated" else z for z in (k, v))
    (tokens,) = learned(k, v, w, q)
    *_, [theirs] = published(torch.zeros_like(k[0]), size, tokens)
    for _, ((ours,),) in answers(cache, (k, v, w, q)):
        if size == 1 or keys == "orthogonal":
            assert_near(ours, theirs, 1e-10)
        else:
            assert (ours - theirs).norm() > 0.1 * ours.norm()
        if size > 1 and keys == "repeated":
            key, value, _ = tokens[0]
            assert (key @ ours - value).norm() < 0.01 < 5 < (key @ theirs - value).norm()
