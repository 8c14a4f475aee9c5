"""Every preset in a Moshi: patched, streamed, saved, shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import SMALL, assert_near, random_codes, stir, streamed, temporal, tiny_lm
from moshi.models.lm import LMModel

import ttt_cache
from ttt_cache import CacheConfig
from ttt_cache.presets import PRESETS
from ttt_cache.report import state_bytes

LENGTH = 50
CONTEXT = 64  # of the model


def small(preset: str) -> dict[str, Any]:
    """Sizes for a preset that make a tiny model evict; a preset without a window keeps none."""
    config = CacheConfig(preset=preset)
    own = {"recent": 0} if config.recent == 0 else {}
    own |= {"virtual": 1} if config.virtual == 1 else {}
    return SMALL | own | {"preset": preset}


@pytest.mark.parametrize("preset", PRESETS)
def test_streaming_equals_parallel_with_all_layers_patched(preset):
    model = tiny_lm()
    ttt_cache.patch(model, **small(preset))
    stir(model)
    codes = random_codes(model, LENGTH)
    expected = temporal(model, codes)
    assert_near(streamed(model, codes), expected)
    assert_near(streamed(model, codes, [1, 7, 2, 1, 1, 30, 8]), expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_streaming_equals_parallel_after_a_silence(preset):
    """The same frame over and over, of which rounding makes many that are not quite the same."""
    model = tiny_lm(dim=64)
    ttt_cache.patch(model, **(small(preset) | {"virtual": 1 if "single" in preset else 8}))
    stir(model)
    codes = random_codes(model, LENGTH)
    codes[:, :, :30] = codes[:, :, :1]
    expected = temporal(model, codes)
    assert_near(streamed(model, codes), expected)
    assert_near(streamed(model, codes, [1, 7, 2, 1, 1, 30, 8]), expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_an_adapter_keeps_its_preset(preset, tmp_path):
    model, again = tiny_lm(), tiny_lm()
    config = ttt_cache.patch(model, **small(preset)).config
    stir(model)
    codes = random_codes(model, 30)
    ttt_cache.save_adapter(model, tmp_path)
    assert ttt_cache.load_adapter(again, tmp_path).config == config
    assert torch.equal(temporal(again, codes), temporal(model, codes))


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "memory-reset"])
def test_a_preset_is_not_another(preset):
    """With weights that matter, each system computes something of its own."""
    if preset in ("full-context", "extended-context"):
        return  # the window, with another recent
    outputs = {}
    for name in {preset, "window", "memory-bank"}:
        model = tiny_lm()
        ttt_cache.patch(model, **small(name))
        stir(model)
        outputs[name] = temporal(model, random_codes(model, LENGTH))
    for name in {"window", "memory-bank"} - {preset}:
        assert not torch.allclose(outputs[preset], outputs[name], atol=1e-3), name


def test_memory_reset_is_the_same_window_without_memory():
    """Weights of any kind: what the memory holds has no way into the output."""
    model, codes = tiny_lm(), random_codes(tiny_lm(), LENGTH)
    outputs = []
    for seed in (2, 3):
        with ttt_cache.patch(model, **small("memory-reset")):
            stir(model, seed)
            outputs.append(temporal(model, codes))
    assert torch.equal(*outputs)
    with ttt_cache.patch(model, **(small("window") | {"recent": SMALL["recent"]})):
        window = temporal(model, codes)
    assert_near(outputs[0][:, : SMALL["recent"]], window[:, : SMALL["recent"]])
    # A window with a memory lets its oldest frames go a chunk at a time; just after that it holds
    # the same frames in the first layer as one without.
    first = model.transformer.layers[0].self_attn
    x = torch.randn(1, LENGTH, 32)
    with ttt_cache.patch(model, layers=[0], **small("memory-reset")):
        chunked = first(x, x, x)
    with ttt_cache.patch(model, layers=[0], **small("window")):
        exact = first(x, x, x)
    at_boundaries = slice(SMALL["recent"] - 1, LENGTH, SMALL["chunk"])
    assert_near(chunked[:, at_boundaries], exact[:, at_boundaries])


@pytest.mark.parametrize("length", [CONTEXT // 2, CONTEXT, 2 * CONTEXT])
def test_a_new_hybrid_is_the_identity_at_any_length(length):
    model = tiny_lm()
    codes = random_codes(model, length)
    stock = temporal(model, codes)
    handle = ttt_cache.patch(model, preset="hybrid", chunk=4)
    assert {cache.window.recent for cache in handle.caches.values()} == {CONTEXT}
    assert_near(temporal(model, codes), stock, 1e-6)
    assert_near(streamed(model, codes), stock)
    stir(model)
    assert not torch.allclose(temporal(model, codes), stock, atol=1e-3)


@pytest.mark.parametrize("preset", ["memory-bank", "ttt-window", "kv-pairs"])
def test_a_new_residual_gate_is_the_identity_of_its_window(preset):
    model = tiny_lm()
    codes = random_codes(model, LENGTH)
    with ttt_cache.patch(model, **(small(preset) | {"gate": "residual"})):
        new = temporal(model, codes)
    with ttt_cache.patch(model, **(small(preset) | {"gate": "residual", "reset_memory": True})):
        assert_near(new, temporal(model, codes), 1e-6)


@pytest.mark.parametrize("preset", ["ttt-linear-layer", "ttt-mlp-layer"])
@torch.no_grad()
def test_ttt_layers_in_the_upper_half_of_32(preset):
    """Layers 16 to 31 without attention: the state after a frame is the state after a thousand."""
    model = tiny_lm(num_layers=32, dim=16, num_heads=2, context=20)
    sizes = {"memory_heads": 1, "memory_dim": 8, "hidden_dim": 8, "chunk": 4}
    handle = ttt_cache.patch(model, preset=preset, layers=range(16, 32), **sizes)
    stir(model)
    with model.streaming(1):
        seen, places = [], []
        for part in random_codes(model, 1001, batch=1).split([1] * 20 + [981 // 9] * 9, dim=2):
            logits = model.forward_text(part)[1]
            assert logits.isfinite().all()
            states = [model.transformer.layers[i].self_attn._streaming_state for i in range(16, 32)]
            seen.append(sum(state_bytes(state) for state in states))
            places.append([t.data_ptr() for s in states for _, t in s.cache.tensors()])
        assert len(set(seen)) == 1 and all(place == places[0] for place in places)
        assert all(state.cache.keys.numel() == 0 for state in states), "there is no ring"
    assert handle.caches[16].gate is None


def shared_lm(**settings: Any) -> tuple[LMModel, ttt_cache.Patch]:
    model = tiny_lm()
    return model, ttt_cache.patch(model, **(SMALL | {"share": True} | settings))


@pytest.mark.parametrize("preset", ["memory-bank", "ttt-window", "random"])
def test_shared_slow_weights(preset, tmp_path):
    """One set of weights, found once; a state and a gate in every layer."""
    model, handle = shared_lm(preset=preset)
    first, *others = handle.caches.values()
    assert all(c.memory is first.memory and c.reader is first.reader for c in others)
    assert len({id(cache.gate) for cache in handle.caches.values()}) == 3
    parameters = ttt_cache.adapter_parameters(model)
    assert len({id(p) for p in parameters}) == len(parameters)
    gates = sum(1 for cache in handle.caches.values() for _ in cache.gate.parameters())
    slow = [*first.memory.parameters(), *first.reader.parameters()]
    assert len(parameters) == len(slow) + gates
    stir(model)
    codes = random_codes(model, LENGTH)
    expected = temporal(model, codes)
    assert_near(streamed(model, codes), expected)
    ttt_cache.save_adapter(model, tmp_path)
    again = tiny_lm()
    loaded = ttt_cache.load_adapter(again, tmp_path)
    assert loaded.caches[0].memory is loaded.caches[2].memory
    assert torch.equal(temporal(again, codes), expected)


def test_layers_with_shared_weights_remember_for_themselves():
    model, handle = shared_lm()
    stir(model)
    with model.streaming(1), torch.no_grad():
        model.forward_text(random_codes(model, 30, batch=1))
        states = [layer.self_attn._streaming_state.cache for layer in model.transformer.layers]
        weights = [state.memory["w2"] for state in states]
    assert not torch.equal(weights[0], weights[1])
    assert weights[0].data_ptr() != weights[1].data_ptr()
    handle.remove()
    assert not any("ttt_cache" in name for name in model.state_dict())


def test_a_shared_memory_learns_from_every_layer():
    model, handle = shared_lm()
    stir(model)
    temporal_loss = model.forward_text(random_codes(model, LENGTH))[1].square().mean()
    temporal_loss.backward()
    whole = handle.caches[0].memory.project.grad.clone()
    apart = tiny_lm()
    separate = ttt_cache.patch(apart, **SMALL)
    for cache in separate.caches.values():
        cache.memory.load_state_dict(handle.caches[0].memory.state_dict())
        cache.reader.load_state_dict(handle.caches[0].reader.state_dict())
    for layer, cache in separate.caches.items():
        cache.gate.load_state_dict(handle.caches[layer].gate.state_dict())
    apart.forward_text(random_codes(apart, LENGTH))[1].square().mean().backward()
    assert_near(whole, sum(cache.memory.project.grad for cache in separate.caches.values()), 1e-4)
