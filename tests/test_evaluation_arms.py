"""Arms: what each control is, on the same frozen model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from evaluation_support import CONTEXT, SETTINGS, random_codes, subject, tiny
from models import assert_near, fingerprint, stir, temporal
from torch import Tensor

import ttt_cache
from ttt_cache.evaluation.arms import Arm, controls, hybrid_layer

FRAMES = 100
N, C = SETTINGS["recent"], SETTINGS["chunk"]
ARMS = controls(CONTEXT, 2, SETTINGS, FRAMES)
UNTRAINED = [name for name, arm in ARMS.items() if not arm.trained]


def trained(lm: torch.nn.Module, arm: Arm, folder: Path) -> Path:
    """An adapter of an arm's settings whose memory has much to say."""
    with ttt_cache.patch(lm, **arm.lesson):
        stir(lm)
        return ttt_cache.save_adapter(lm, folder)


def outputs(name: str, lm: torch.nn.Module, codes: Tensor, folder: Path) -> Tensor:
    arm = ARMS[name]
    with arm.on(lm, trained(lm, arm, folder / name) if arm.trained else None):
        return temporal(lm, codes)


def test_every_control_of_the_plan_is_there():
    assert set(ARMS) == {
        *("full", "stock", "extended", "window", "longest", "sinks", "mean", "cluster", "random"),
        *("reset", "hybrid", "hierarchical"),
    }
    trained_ones = {name for name in ARMS if name not in UNTRAINED}
    assert trained_ones == {"random", "reset", "hybrid", "hierarchical"}
    assert controls(3000, 32, {}, 0)["extended"].settings["recent"] == 8000
    assert hybrid_layer(32) == 30


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_leaves_the_model_as_it_was(name, tmp_path):
    lm = tiny()
    adapter = trained(lm, ARMS[name], tmp_path) if ARMS[name].trained else None
    before, weights = fingerprint(lm), {k: t.clone() for k, t in lm.state_dict().items()}
    with ARMS[name].on(lm, adapter):
        temporal(lm, random_codes(lm, 20))
    assert fingerprint(lm) == before
    assert all(torch.equal(tensor, weights[key]) for key, tensor in lm.state_dict().items())


def test_stock_and_full_context_are_what_they_are_called(tmp_path):
    lm, wide = tiny(), tiny(context=FRAMES)
    codes = random_codes(lm, FRAMES)
    assert_near(outputs("stock", lm, codes, tmp_path), temporal(lm, codes))
    assert_near(outputs("full", lm, codes, tmp_path), temporal(wide, codes))
    assert_near(outputs("extended", lm, codes, tmp_path), temporal(wide, codes))  # 171 frames


def test_a_memory_that_is_reset_is_the_window(tmp_path):
    lm = tiny()
    codes = random_codes(lm, FRAMES)
    window, reset = (outputs(name, lm, codes, tmp_path) for name in ("window", "reset"))
    assert_near(reset, window)
    assert not torch.allclose(window, outputs("hierarchical", lm, codes, tmp_path))


def test_the_window_is_between_its_shortest_and_its_longest(tmp_path):
    lm = tiny(num_layers=1)  # in one layer a frame sees nothing of what others saw
    codes = random_codes(lm, FRAMES)
    shortest = Arm("shortest", "", {"recent": N, "memory": "none"})
    with shortest.on(lm):
        least = temporal(lm, codes)
    arms = controls(CONTEXT, 1, SETTINGS, FRAMES)
    with arms["longest"].on(lm):
        most = temporal(lm, codes)
    with arms["window"].on(lm):
        window = temporal(lm, codes)
    seen = torch.arange(1, FRAMES + 1)
    seen = seen - C * ((seen - N).clamp_min(0) // C)  # docs/semantics.md: tokens e + 1 .. n
    assert_near(window[:, seen == N], least[:, seen == N])
    assert_near(window[:, seen == N + C - 1], most[:, seen == N + C - 1])
    assert not torch.allclose(window, least) and not torch.allclose(window, most)


def test_a_window_costs_what_a_bare_one_does():
    lm = tiny()
    held = {}
    for name in ("window", "longest", "mean"):
        with ARMS[name].costed.on(lm):
            held[name] = ttt_cache.report(lm).patched_bytes
    assert held["window"] == held["longest"] < held["mean"]
    assert ARMS["window"].costed.settings["recent"] == N + C - 1
    assert ARMS["mean"].costed is ARMS["mean"]


def after_two_pasts(name, tmp_path):
    """An arm's outputs from frame 70 on, of codes that differ in their first 50 frames alone."""
    lm = tiny(num_layers=1)
    arm = controls(CONTEXT, 1, SETTINGS, FRAMES)[name]
    codes = random_codes(lm, FRAMES)
    other = codes.clone()
    other[:, :, :50] = random_codes(lm, 50, seed=9)
    adapter = trained(lm, arm, tmp_path) if arm.trained else None
    with arm.on(lm, adapter):
        return temporal(lm, codes)[:, 70:], temporal(lm, other)[:, 70:]


@pytest.mark.parametrize("name", ["window", "longest", "random", "reset"])
def test_what_remembers_nothing_does_not_see_the_past(name, tmp_path):
    assert_near(*after_two_pasts(name, tmp_path))


@pytest.mark.parametrize("name", ["full", "sinks", "mean", "cluster", "hierarchical"])
def test_what_remembers_does(name, tmp_path):
    assert not torch.allclose(*after_two_pasts(name, tmp_path))


def test_what_untrained_means():
    """Windows have no weights; the others only the gate's bias, which starts at an even share."""
    lm = tiny()
    for name, count in (("window", 0), ("longest", 0), ("sinks", 0), ("mean", 2), ("cluster", 2)):
        with ARMS[name].on(lm):
            assert len(ttt_cache.adapter_parameters(lm)) == count  # the gate's bias by head
            assert not any(weight.any() for weight in ttt_cache.adapter_parameters(lm))


def test_random_tokens_say_nothing_until_they_are_read_by_trained_maps():
    lm = tiny()
    with ttt_cache.patch(lm, **ARMS["random"].settings) as handle:
        for cache in handle.caches.values():
            values = [p for n, p in cache.reader.named_parameters() if "value" in n]
            assert values and not any(value.any() for value in values)


@pytest.mark.parametrize("name", UNTRAINED)
def test_an_untrained_arm_is_the_same_every_time(name):
    lm, codes = tiny(), random_codes(tiny(), 40)
    state = torch.get_rng_state()
    first = [None, None]
    for turn in range(2):
        with ARMS[name].on(lm):
            first[turn] = temporal(lm, codes)
    assert torch.equal(*first)
    assert torch.equal(torch.get_rng_state(), state)


def test_adapters_must_fit_the_arm(tmp_path):
    lm = tiny()
    adapter = trained(lm, ARMS["hierarchical"], tmp_path)
    before = fingerprint(lm)
    refused = {
        ("hierarchical", None): "hierarchical takes an adapter",
        ("window", adapter): "window takes no adapter",
        ("hybrid", adapter): "other settings than those of hybrid",
    }
    for (name, given), message in refused.items():
        with pytest.raises(ValueError, match=message), ARMS[name].on(lm, given):
            pass
    assert fingerprint(lm) == before


def test_settings_that_say_the_same_are_the_same(tmp_path):
    lm = tiny()
    adapter = trained(lm, ARMS["hierarchical"], tmp_path)
    others = {**SETTINGS, "layers": (-1, 0), "preset": "memory-bank", "bptt": 3}
    alike = Arm("alike", "", others, trained=True)
    with alike.on(lm, adapter) as handle:
        assert handle.layers == (0, 1)


def test_a_subject_finds_what_was_trained_already(tmp_path):
    lm = tiny()
    adapter = trained(lm, ARMS["hierarchical"], tmp_path)
    given = subject(lm, adapter=adapter)
    assert given.trained_already(ARMS["hierarchical"]) == adapter
    assert given.trained_already(ARMS["reset"]) == adapter
    assert given.trained_already(ARMS["hybrid"]) is None
    assert given.far == N + C and given.context == CONTEXT
