"""The parallel form is differentiable through the memory, and what is trained can be trained."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOAT64, WITH_MEMORY, cases
from support import Case, Tokens, assert_near
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call

from ttt_cache import CacheConfig, CacheState, HierarchicalCache
from ttt_cache.config import GATES
from ttt_cache.exclusions import NETWORKS
from ttt_cache.presets import PRESETS, settings_of

SMALL = {"chunk": 2, "virtual": 2, "memory_heads": 2, "memory_dim": 2, "hidden_dim": 3}
SETTINGS: list[dict[str, Any]] = [{"gate": gate, "sinks": 1} for gate in GATES]
SETTINGS += [{"memory": name, "gate": "query"} for name in WITH_MEMORY]
SETTINGS += [{"preset": name} for name in PRESETS if name not in ("memory-bank", "window")]
SETTINGS += [
    {"depth": 3},
    {"depth": 3, "read": "query", "write": "arrived", "recent": 0, "source": "kv"},
    {"memory": "ttt-linear", "chunk": 1, "write": "arrived"},
    {"source": "output", "gate": "joint"},
    {"read": "query", "source": "kv"},
    {"position": "slot"},
    {"position": "decay"},
]


def named(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items())


every_setting = pytest.mark.parametrize("settings", SETTINGS, ids=named)


def small_config(sizes: dict[str, Any], settings: dict[str, Any], recent: int) -> CacheConfig:
    """Given settings, small where they are silent; a window, if they have one, of `recent`."""
    fields = sizes | settings_of(settings.get("preset")) | settings
    return CacheConfig(**(fields | {"recent": 0 if fields.get("recent") == 0 else recent}))


def small_case(**settings: Any) -> Case:
    config = small_config(SMALL, settings, recent=3)
    return Case(config, num_heads=2, kv_heads=1, head_dim=2, dim=3)


def check(cache: HierarchicalCache, tokens: Tokens, state: CacheState | None, cut: int) -> None:
    """Compare all derivatives of two successive calls with finite differences."""
    weights = dict(cache.named_parameters())

    def outputs(*leaves: Tensor) -> Tensor:
        given = Tokens(*leaves[:4])
        parameters = dict(zip(weights, leaves[4:], strict=True))
        first, middle = functional_call(cache, parameters, (*given.cut(0, cut), state))
        rest, _ = functional_call(cache, parameters, (*given.cut(cut, given.length), middle))
        return torch.cat([first, rest], dim=2)

    leaves = [z.detach().clone().requires_grad_() for z in (*tokens, *weights.values())]
    # Fast: one random direction in place of every element, which a wrong derivative cannot hide in.
    assert gradcheck(outputs, leaves, fast_mode=True)


@every_setting
def test_derivatives_by_every_input_and_weight(settings):
    case = small_case(**settings)
    cache = case.build_stirred()
    check(cache, case.tokens(1, 10), None, cut=6)


@pytest.mark.parametrize("preset", ["memory-bank", "ttt-window", "ttt-mlp-layer", "hybrid"])
def test_derivatives_from_rows_in_different_phases(preset):
    """One row is still empty, one between two versions, one at a version."""
    case = small_case(preset=preset)
    cache = case.build_stirred()
    state = cache.init_state(3)
    cache.stream(*case.tokens(3, 5), state, torch.tensor([False, False, True]))
    cache.stream(*case.tokens(3, 4), state, torch.tensor([False, True, False]))
    check(cache, case.tokens(3, 4), state, cut=3)


def test_derivatives_while_the_cap_bites():
    case = small_case()
    cache = case.build_stirred()
    with torch.no_grad():
        cache.memory.fast.w2.mul_(5)
    check(cache, case.tokens(1, 7), None, cut=4)


def gradients(y: Tensor, tokens: Tokens, cache: HierarchicalCache) -> list[Tensor]:
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    leaves = [*tokens, *cache.parameters()]
    return list(torch.autograd.grad((y * weight).sum(), leaves, materialize_grads=True))


NETWORKS_THAT_ARE_READ = cases(memory=NETWORKS, dtype=FLOAT64).filter(
    lambda case: not case.config.reset_memory
)


@given(NETWORKS_THAT_ARE_READ, st.integers(1, 3), st.integers(0, 12))
def test_truncation_detaches_the_memory_and_nothing_else(case, horizon, extra):
    """The same as calls that end where the horizon does, with the memory's own state detached."""
    case = replace(case, config=replace(case.config, bptt=horizon))
    whole = replace(case, config=replace(case.config, bptt=None))
    cut, free = case.build_stirred(), whole.build_stirred()
    period = horizon * case.config.chunk
    tokens = Tokens(*(z.requires_grad_() for z in case.tokens(2, case.capacity + period + extra)))
    expected, state = [], None
    ends = [*range(case.config.window.wait + period, tokens.length, period), tokens.length]
    for start, end in zip([0, *ends], ends, strict=False):
        y, state = free(*tokens.cut(start, end), state)
        state = replace(state, memory={name: t.detach() for name, t in state.memory.items()})
        expected.append(y)
    y, _ = cut(*tokens)
    pairs = zip(
        gradients(y, tokens, cut),
        gradients(torch.cat(expected, dim=2), tokens, free),
        strict=True,
    )
    for mine, theirs in pairs:
        assert_near(mine, theirs, 1e-9, scale=1e-3)


def test_the_horizon_is_where_gradients_end():
    """The last query reads version 4. It reaches back to chunks 3 and 4 only if bptt is 2."""
    reached = {}
    for bptt in (None, 2):
        case = small_case(bptt=bptt, gate="head")
        cache = case.build_stirred()
        tokens = case.tokens(1, 3 + 4 * 2)
        x = tokens.x.requires_grad_()
        y, _ = cache(*tokens._replace(x=x))
        (by_x,) = torch.autograd.grad(y[:, :, -1].square().sum(), x)
        reached[bptt] = by_x[0].norm(dim=-1) > 0
    # The last three tokens are in the window, and no memory has taken them in.
    assert reached[None].tolist() == [True] * 8 + [False] * 3
    assert reached[2].tolist() == [False] * 4 + [True] * 4 + [False] * 3


def train(config: CacheConfig, length: int, steps: int) -> None:
    """Every weight of a new cache gets a gradient by the last of some steps towards noise."""
    case = Case(config, num_heads=2, kv_heads=2, head_dim=8, dim=16, dtype=torch.float32)
    cache = case.build()
    if not list(cache.parameters()):
        return
    optimizer = torch.optim.Adam(cache.parameters(), lr=1e-2)
    tokens = case.tokens(2, length)
    target = torch.randn_like(tokens.q)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (cache(*tokens)[0] - target).square().mean()
        loss.backward()
        optimizer.step()
    for name, parameter in cache.named_parameters():
        assert parameter.grad is not None, f"{name} is not used"
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), f"{name} gets no gradient"


def test_every_weight_learns_from_the_first_step_on():
    config = CacheConfig()
    train(config, length=config.recent + 6 * config.chunk, steps=1)


@every_setting
def test_every_weight_learns_by_the_third_step(settings):
    sizes = {"chunk": 4, "virtual": 3, "memory_heads": 2, "memory_dim": 4, "hidden_dim": 6}
    config = small_config(sizes, settings, recent=6)
    if not config.reset_memory:  # a control without gradients
        train(config, length=30, steps=3)
