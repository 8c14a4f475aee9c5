"""What is observed of a memory, beside an oracle that adds it up one token at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import SMALL, random_codes, stir, temporal, tiny_lm
from oracle import Oracle
from torch import Tensor, nn

import ttt_cache
from ttt_cache import CacheConfig
from ttt_cache.presets import PRESETS
from ttt_cache.training.monitor import Observed, figures_of, observe

LENGTH = 30
GATES = ["joint", "fixed", "layer", "head", "query", "residual"]


def small(preset: str) -> dict[str, Any]:
    """Sizes that make a tiny model evict; a preset without a window keeps none."""
    own = {"recent": 0} if CacheConfig(preset=preset).recent == 0 else {}
    return SMALL | own | {"preset": preset}


class Watched(Oracle):
    """An oracle that keeps, of each query that reads the memory, its mass and both branches."""

    def reset(self) -> None:
        super().reset()
        self.masses: list[float] = []
        self.squares = torch.zeros(2, dtype=torch.float64)  # of memory and window

    def gated(self, head: int, q: Tensor, recent: Tensor, memory: Tensor) -> Tensor:
        output = super().gated(head, q, recent, memory)
        kind = self.config.gate
        if kind == "joint":
            near, far = self.exact_tokens(head, q)[0], self.virtual_tokens(head, q)[0]
            near, far = near.exp(), (far + self.weights["gate.bias"][head]).exp()
            mass = far.sum() / (near.sum() + far.sum())
        elif kind == "residual":
            mass = torch.tanh(self.weights["gate.bias"][head])
        else:  # what the output holds of the memory, wherever both branches differ
            difference = memory - recent
            mass = ((output - recent) @ difference) / (difference @ difference)
        added = mass * memory
        self.masses.append(abs(float(mass)))
        self.squares += torch.stack([added @ added, (output - added) @ (output - added)])
        return output


def watched(handle: ttt_cache.Patch, layer: int, run) -> Observed:
    """What the oracle says of one layer; its gate's openness is left to other tests."""
    cache, calls = handle.caches[layer], []
    hook = cache.register_forward_hook(lambda _, args, out: calls.append((args, out[0])))
    run()
    hook.remove()
    masses, squares = [], torch.zeros(2, dtype=torch.float64)
    (args, out), *_ = calls
    for row in range(out.shape[0]):
        oracle = Watched(cache)
        for t in range(out.shape[2]):
            heads = (z[row, :, t] for z in args[:3])
            y = oracle.push(*heads, args[3][row, t])
            assert torch.allclose(y, out[row, :, t].double(), rtol=1e-3, atol=1e-4)
        masses += oracle.masses
        squares += oracle.squares
    if not masses:
        return Observed(0.0, 0.0, 0.0)
    return Observed(0.0, sum(masses) / len(masses), float(squares[0] / squares[1]) ** 0.5)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_against_the_oracle(preset):
    model = tiny_lm()
    handle = ttt_cache.patch(model, layers=[1], **small(preset))
    stir(model)
    codes = random_codes(model, LENGTH)
    seen = observe(handle, lambda: model(codes))[1]
    if handle.config.recent == 0:
        assert seen == Observed(1.0, 1.0, 1.0)
        return
    expected = watched(handle, 1, lambda: model(codes))
    assert seen.mass == pytest.approx(expected.mass, rel=1e-4, abs=1e-9)
    assert seen.ratio == pytest.approx(expected.ratio, rel=1e-4, abs=1e-9)
    reads = handle.config.memory != "none" and not handle.config.reset_memory
    assert (seen.mass > 0.01 and seen.ratio > 0.01) == reads
    assert (seen.gate > 0) == (handle.config.memory != "none")


@pytest.mark.parametrize(("read", "gate"), [("virtual", g) for g in GATES] + [("query", "layer")])
def test_every_gate_against_the_oracle(read, gate):
    model = tiny_lm(kv_repeat=2)
    handle = ttt_cache.patch(model, layers=[0, 2], read=read, gate=gate, alpha=0.8, **SMALL)
    stir(model)
    codes = random_codes(model, LENGTH)
    observed = observe(handle, lambda: model(codes))
    for layer in (0, 2):
        expected = watched(handle, layer, lambda: model(codes))
        assert observed[layer].mass == pytest.approx(expected.mass, rel=1e-4)
        assert observed[layer].ratio == pytest.approx(expected.ratio, rel=1e-4)


@pytest.mark.parametrize("read", ["virtual", "query"])
def test_padding_is_not_looked_at(read):
    model = tiny_lm()
    handle = ttt_cache.patch(model, layers=[0, 2], read=read, **SMALL)
    stir(model)
    codes = random_codes(model, LENGTH)
    counts = (torch.arange(LENGTH) < LENGTH - 10).expand(2, -1)
    seen = observe(handle, lambda: model.forward_text(codes), counts)
    expected = observe(handle, lambda: model.forward_text(codes[:, :, :-10]))
    for layer in (0, 2):
        assert vars(seen[layer]) == pytest.approx(vars(expected[layer]), rel=1e-4)


@pytest.mark.parametrize("read", ["virtual", "query"])
def test_a_fixed_share_is_the_mass(read):
    """Tokens that read no memory yet do not dilute it."""
    model = tiny_lm()
    handle = ttt_cache.patch(model, read=read, gate="fixed", alpha=0.7, **SMALL)
    for seen in observe(handle, lambda: model(random_codes(model, 11))).values():
        assert seen.gate == pytest.approx(0.3) and seen.mass == pytest.approx(0.3)
        assert seen.ratio == 0  # values start at zero
    unwritten = observe(handle, lambda: model(random_codes(model, 9)))  # recent + chunk - 1
    assert all((seen.mass, seen.ratio) == (0, 0) for seen in unwritten.values())


@pytest.mark.parametrize(
    ("gate", "weights", "openness"),
    [
        ("joint", [0.0, math.log(3), -math.log(3), 0.0], 0.5),
        ("joint", [math.log(3)] * 4, 0.75),
        ("layer", [math.log(3)], 0.25),
        ("head", [math.log(3), 0.0, math.log(3), 0.0], 0.375),
        ("query", [0.0] * 4, 0.5),
        ("residual", [math.atanh(0.5), math.atanh(-0.5), 0.0, 0.0], 0.25),
    ],
)
def test_openness_by_hand(gate, weights, openness):
    model = tiny_lm()
    handle = ttt_cache.patch(model, layers=[2], gate=gate, **SMALL)
    with torch.no_grad():
        handle.caches[2].gate.bias.copy_(torch.tensor(weights))
    seen = observe(handle, lambda: model(random_codes(model, 12)))[2]
    assert seen.gate == pytest.approx(openness, rel=1e-6)


def test_no_window_to_compare_with():
    model = tiny_lm()
    handle = ttt_cache.patch(model, gate="fixed", alpha=0.0, **SMALL)
    stir(model)
    for seen in observe(handle, lambda: model(random_codes(model, LENGTH))).values():
        assert seen == Observed(1.0, 1.0, 1.0)


@pytest.mark.parametrize("preset", ["memory-bank", "hierarchical", "ttt-window", "cluster"])
def test_segments_of_a_recording_are_one_run(preset):
    """Tokens count, not calls; the second look does not disturb what is carried on."""
    model = tiny_lm()
    handle = ttt_cache.patch(model, layers=[0], **small(preset))
    stir(model)
    codes = random_codes(model, LENGTH)
    whole = observe(handle, lambda: model.forward_text(codes))[0]
    cache, attention = handle.caches[0], model.transformer.layers[0].self_attn
    x, states = [], [None]
    attention.register_forward_pre_hook(lambda _, args: x.append(args[0]))
    cache.register_forward_pre_hook(lambda _, args: (*args, states[-1]))
    cache.register_forward_hook(lambda _, args, output: states.append(output[1]))
    model.forward_text(codes)
    states[1:] = []

    def run() -> None:
        for part in x[0].split([7, 13, 10], dim=1):
            attention(part, part, part)

    parts = observe(handle, run)[0]
    assert len(states) == 4 and all(isinstance(s, ttt_cache.CacheState) for s in states[1:])
    assert parts.mass == pytest.approx(whole.mass, rel=1e-4)
    assert parts.ratio == pytest.approx(whole.ratio, rel=1e-4)


@pytest.mark.parametrize("preset", ["memory-bank", "ttt-window", "mean", "hybrid"])
def test_bfloat16_is_near_float32(preset):
    """The branches are measured, not subtracted: a small one keeps its digits."""
    figures = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_lm()
        handle = ttt_cache.patch(model, layers=[0], **small(preset))
        stir(model)
        reader = handle.caches[0].reader
        for name in ("to_value", "to_output"):
            if hasattr(reader, name):
                getattr(reader, name).data.mul_(1e-4)
        model.to(dtype)
        figures.append(observe(handle, lambda m=model: m(random_codes(m, LENGTH)))[0])
    exact, rounded = figures
    for name in ("gate", "mass", "ratio"):
        assert getattr(rounded, name) == pytest.approx(getattr(exact, name), rel=0.05)


def everything(model: nn.Module) -> dict[str, Any]:
    state = {n: p.detach().clone() for n, p in model.state_dict().items()}
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    hooks = {n: list(m._forward_hooks) for n, m in model.named_modules()}
    inside = {n: sorted(vars(m)) for n, m in model.named_modules()}
    return {"state": state, "grads": grads, "hooks": hooks, "inside": inside}


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["hooks"] == after["hooks"] and before["inside"] == after["inside"]
    for kind in ("state", "grads"):
        for name, old in before[kind].items():
            new = after[kind][name]
            assert (old is None and new is None) or torch.equal(old, new), name


@pytest.mark.parametrize("preset", ["memory-bank", "ttt-window"])
def test_looking_changes_nothing(preset):
    model = tiny_lm()
    handle = ttt_cache.patch(model, share=True, **small(preset))
    stir(model)
    codes = random_codes(model, LENGTH)
    model(codes).text_logits.nan_to_num().square().mean().backward()
    before, random = everything(model), torch.get_rng_state()
    expected = temporal(model, codes)

    def run() -> None:
        assert torch.equal(temporal(model, codes), expected)
        assert not torch.is_grad_enabled()

    observe(handle, run)
    assert torch.is_grad_enabled() and torch.equal(random, torch.get_rng_state())
    assert_same(before, everything(model))


@pytest.mark.parametrize("preset", ["memory-bank", "ttt-window"])
def test_an_error_leaves_nothing_behind(preset, monkeypatch):
    model = tiny_lm()
    handle = ttt_cache.patch(model, **small(preset))
    before = everything(model)
    codes = random_codes(model, LENGTH)

    def interrupted() -> None:
        model(codes)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        observe(handle, interrupted)
    assert_same(before, everything(model))
    forward = ttt_cache.HierarchicalCache.forward
    calls = []

    def second_fails(self, *args):
        calls.append(self)
        if len(calls) == 2:
            raise MemoryError("full")
        return forward(self, *args)

    monkeypatch.setattr(ttt_cache.HierarchicalCache, "forward", second_fails)
    with pytest.raises(MemoryError):
        observe(handle, lambda: model(codes))
    assert_same(before, everything(model))


def test_refusals():
    model = tiny_lm()
    handle = ttt_cache.patch(model, layers=[0, 2], **SMALL)
    with pytest.raises(RuntimeError, match=r"run did not reach the caches of layers \[0, 2\]"):
        observe(handle, lambda: None)
    with model.streaming(1), pytest.raises(RuntimeError, match="observed while it is streaming"):
        observe(handle, lambda: model)


@pytest.mark.parametrize("block", [1, 40])
def test_blocks_of_queries_add_up(block, monkeypatch):
    """A long call is answered block by block; what is seen of it is the same as in one."""
    model = tiny_lm()
    handle = ttt_cache.patch(model, **SMALL)
    stir(model)
    codes = random_codes(model, 60)
    found = []
    for size in (1000, block):
        monkeypatch.setattr("ttt_cache.span.BLOCK", size)
        found.append(observe(handle, lambda: temporal(model, codes)))
    whole, parts = found
    for layer, seen in whole.items():
        assert seen.mass > 0.01
        assert parts[layer].mass == pytest.approx(seen.mass, rel=1e-4)
        assert parts[layer].ratio == pytest.approx(seen.ratio, rel=1e-4)


def test_figures_are_named_by_layer():
    figures = figures_of({25: Observed(0.1, 0.2, 0.3), 31: Observed(1, 0, 2)})
    assert figures == {
        "gate/25": 0.1,
        "mass/25": 0.2,
        "ratio/25": 0.3,
        "gate/31": 1,
        "mass/31": 0,
        "ratio/31": 2,
    }
