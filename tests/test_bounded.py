"""100,000 updates with inputs chosen to break the memory: the fast weights keep their bounds."""

import math
from collections.abc import Callable

import pytest
import torch
from support import Case, Tokens
from torch import Tensor
from torch.nn.functional import gelu, normalize

from ttt_cache import CacheConfig, HierarchicalCache

HEADS, D, HIDDEN, CHUNK = 2, 4, 8, 8
UPDATES = 100_000
CALL = 125  # not a multiple of the chunk: calls end in every phase of it
CANDIDATES = 16
DIM = HEADS * (2 * D + 1)
NETWORKS = [{"memory": "ttt-linear"}, {"depth": 2}, {"depth": 3}]


def hostile_cache(network: dict[str, object]) -> HierarchicalCache:
    """A memory whose keys, values and rates are the hidden states themselves."""
    sizes = {"memory_heads": HEADS, "memory_dim": D, "hidden_dim": HIDDEN}
    config = CacheConfig(recent=1, chunk=CHUNK, virtual=1, **sizes, **network)
    cache = Case(config, num_heads=1, kv_heads=1, head_dim=2, dim=DIM, dtype=torch.float32).build()
    with torch.no_grad():
        cache.memory.project.copy_(torch.eye(DIM))
        last(cache.memory.fast.layers).normal_(std=0.5)
        if cache.memory.fast.hidden:
            cache.memory.fast.step_size.fill_(4.0)
    return cache


def constant(start: int) -> Tensor:
    return torch.ones(CALL, DIM)


def alternating(start: int) -> Tensor:
    sign = 1 - 2 * (torch.arange(start, start + CALL) % 2)
    return sign[:, None] * torch.linspace(-1, 1, DIM)


def huge(start: int) -> Tensor:
    return 1e4 * torch.randn(CALL, DIM)


def tiny(start: int) -> Tensor:
    return 1e-4 * torch.randn(CALL, DIM)


def one_hot(start: int) -> Tensor:
    return torch.eye(DIM)[torch.arange(start, start + CALL) % DIM]


def switched(start: int) -> Tensor:
    """One token repeated for a long time, then another."""
    generator = torch.Generator().manual_seed(start // 5000)
    return (3 * torch.randn(1, DIM, generator=generator)).expand(CALL, DIM)


def opposed(start: int) -> Tensor:
    """Nearly the same keys ask for opposite values."""
    x = torch.ones(CALL, DIM) + 1e-2 * torch.randn(CALL, DIM)
    x[::2, HEADS * D : 2 * HEADS * D] *= -1
    return x


PATTERNS: list[Callable[[int], Tensor]] = [
    constant,
    alternating,
    huge,
    tiny,
    one_hot,
    switched,
    opposed,
]


def last(layers: dict[str, Tensor]) -> Tensor:
    """F of the semantics: the layer that the delta rule trains."""
    return list(layers.values())[-1]


def adaptive(layers: list[Tensor]) -> Tensor:
    """Tokens that make |F| grow: with eta and |phi| near 1, by |v|^2 - |phi F|^2 each.

    So every key is the one of several whose prediction is smallest, and values are as long as rms
    lets them be.
    """
    keys = torch.randn(HEADS, CALL, CANDIDATES, D)
    phi = normalize(keys, dim=-1)
    for weight in layers[:-1]:
        phi = normalize(gelu(phi @ weight[:, None], approximate="tanh"), dim=-1)
    best = (phi @ layers[-1][:, None]).norm(dim=-1).argmin(dim=-1)
    keys = keys.take_along_dim(best[..., None, None], dim=2).squeeze(2)
    values = 100 * torch.randn(HEADS, CALL, D).sign()
    full_rate = torch.full((CALL, HEADS), 30.0)
    flat = [part.transpose(0, 1).flatten(1) for part in (keys, values)]
    return torch.cat([*flat, full_rate], dim=1)


@pytest.mark.parametrize("network", NETWORKS)
@torch.no_grad()
def test_fast_weights_stay_bounded_for_ever(network):
    cache, state = hostile_cache(network), None
    first = cache.memory.fast.layers
    columns = {name: first[name].norm(dim=-2) for name in cache.memory.fast.hidden}
    cap = math.sqrt(last(first).shape[-2] * D)
    bound = last(first).norm(dim=(-2, -1)).clamp(min=cap) + CHUNK * math.sqrt(D)
    rows, largest = len(PATTERNS) + 1, torch.zeros(len(PATTERNS) + 1, HEADS)
    plain = torch.zeros(rows, 1, CALL, 2)
    for start in range(0, UPDATES + CALL, CALL):  # the window keeps the newest token
        seen = list(first.values()) if state is None else [state.memory[n][-1] for n in first]
        x = torch.stack([*(pattern(start) for pattern in PATTERNS), adaptive(seen)])
        y, state = cache(*Tokens(plain, plain, plain, x), state)
        fast = {name: state.memory[name] for name in first}
        sizes = last(fast).norm(dim=(-2, -1))
        assert (sizes <= bound).all()
        if (start + CALL - 1) % CHUNK == 0:
            assert (sizes <= cap * (1 + 1e-6)).all(), "a chunk ended above the cap"
        for name, length in columns.items():
            assert (fast[name].norm(dim=-2) <= length * (1 + 1e-6)).all()
        assert y.isfinite().all()
        for name, tensor in state.tensors():
            assert tensor.isfinite().all(), name
        largest = largest.maximum(sizes)
    # The test is worth something only if someone pushes against the cap.
    assert (largest[-1] > cap).all() and (largest[PATTERNS.index(huge)] > cap).all()
