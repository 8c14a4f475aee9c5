"""Everything that Moshi's model does, patched: streaming equals the parallel form."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import SMALL, assert_near, random_codes, stir, streamed, temporal, tiny_lm
from moshi.conditioners import ConditionAttributes
from moshi.models.lm import LMGen, LMModel
from moshi.models.loaders import get_condition_fuser, get_conditioner_provider
from moshi.modules.lora import replace_all_linear_with_lora, replace_lora_with_linear
from torch import Tensor

import ttt_cache

LENGTH = 50

VARIANTS = {
    "plain": {},
    "grouped keys": {"kv_repeat": 2},
    "speech to text": {"dep_q": 0},
    "sinusoidal positions": {"positional_embedding": "sin"},
    "both positions": {"positional_embedding": "sin_rope"},
    "concatenated rope": {"positional_embedding": "rope_concat"},
    "no positions": {"positional_embedding": "none"},
    "layer norm and scale": {"norm": "layer_norm", "layer_scale": 0.3},
    "gradient checkpointing": {"gradient_checkpointing": True},
}


def patched_lm(settings: dict | None = None, **changes) -> LMModel:
    model = tiny_lm(**changes)
    ttt_cache.patch(model, **(SMALL | (settings or {})))
    stir(model)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("settings", [{}, {"sinks": 2, "gate": "head"}, {"memory": "mean"}])
def test_streaming_equals_parallel(variant, settings):
    model = patched_lm(settings, **VARIANTS[variant])
    codes = random_codes(model, LENGTH)
    expected = temporal(model, codes)
    assert_near(streamed(model, codes), expected)
    assert_near(streamed(model, codes, [1, 7, 2, 1, 1, 30, 8]), expected)


@given(data=st.data())
def test_rows_drift_apart_and_still_equal_their_own_sequence(data):
    """Exec masks, masked resets and calls of any length: every row is its own conversation."""
    batch = 3
    model = patched_lm({"sinks": data.draw(st.integers(0, 2))}, num_layers=2)
    codes = random_codes(model, LENGTH, batch=batch)
    used: list[list[Tensor]] = [[] for _ in range(batch)]  # codes of each row since its reset
    outputs: list[list[Tensor]] = [[] for _ in range(batch)]
    rows = st.lists(st.booleans(), min_size=batch, max_size=batch).map(torch.tensor)
    with model.streaming(batch), torch.no_grad():
        start = 0
        while start < LENGTH:
            if data.draw(st.integers(0, 9), label="reset?") == 0:
                reset = data.draw(rows, label="reset")
                model.reset_streaming(reset)
                for row in reset.nonzero().flatten().tolist():
                    used[row], outputs[row] = [], []
            active = data.draw(rows, label="active")
            length = data.draw(st.sampled_from([1, 1, 1, 2, 5, 11]), label="length")
            part = codes[:, :, start : start + length]
            start += length
            model.set_exec_mask(active)
            logits = model.forward_text(part)[1][:, 0]
            for row in active.nonzero().flatten().tolist():
                used[row].append(part[row])
                outputs[row].append(logits[row])
    for row in range(batch):
        if used[row]:
            expected = temporal(model, torch.cat(used[row], dim=1)[None])
            assert_near(torch.cat(outputs[row])[None], expected)


def test_get_and_set_streaming_state_carry_the_cache():
    model = patched_lm()
    codes = random_codes(model, LENGTH)
    expected = temporal(model, codes)
    with model.streaming(2), torch.no_grad():
        model.forward_text(codes[:, :, :20])
        saved = copy.deepcopy(model.get_streaming_state())
        first = model.forward_text(codes[:, :, 20:])[1][:, 0]
        model.set_streaming_state(saved)
        again = torch.cat([model.forward_text(c)[1][:, 0] for c in codes[:, :, 20:].split(1, 2)], 1)
    assert_near(first, expected[:, 20:])
    assert_near(again, expected[:, 20:])


@pytest.mark.parametrize("fuse", [False, True])
def test_lora(fuse):
    model = tiny_lm()
    plain = temporal(model, random_codes(model, LENGTH))
    replace_all_linear_with_lora(model, rank=2, scaling=2.0)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    codes = random_codes(model, LENGTH)
    unfused = temporal(model, codes)
    assert not torch.allclose(unfused, plain, atol=1e-3)
    if fuse:
        replace_lora_with_linear(model)
    with ttt_cache.patch(model, memory="none", recent=64):
        assert_near(temporal(model, codes), unfused)
    ttt_cache.patch(model, **SMALL)
    stir(model)
    assert_near(streamed(model, codes), temporal(model, codes))
    if not fuse:  # fusing later swaps in_projs under the patch
        before = temporal(model, codes)
        for layer in model.transformer.layers:
            replace_lora_with_linear(layer)
        assert_near(temporal(model, codes), before)


def conditioned_lm() -> tuple[LMModel, dict]:
    config = {
        "conditioners": {"mood": {"type": "lut", "lut": {
            "n_bins": 4, "dim": 8, "tokenizer": "noop", "possible_values": ["calm", "glad"]}}},
        "fuser": {"sum": ["mood"]},
    }  # fmt: skip
    provider = get_conditioner_provider(32, "cpu", config)
    model = tiny_lm(condition_provider=provider, fuser=get_condition_fuser(config))
    moods = [ConditionAttributes(text={"mood": m}, tensor={}) for m in ("calm", "glad") * 2]
    return model, provider.prepare_and_provide(moods)


def test_classifier_free_guidance_doubles_rows_and_conditions():
    """A run with a long window is the stock run; a reset row starts again."""
    model, conditions = conditioned_lm()
    codes = random_codes(model, 30)[:, 3:]

    def generate(recent: int | None, reset_at: int | None = None) -> list[Tensor | None]:
        handle = recent and ttt_cache.patch(model, memory="none", recent=recent)
        gen = LMGen(model, use_sampling=False, cfg_coef=2.0, condition_tensors=conditions,
                    support_out_of_sync=True)  # fmt: skip
        with gen.streaming(2):
            steps = []
            for t in range(codes.shape[2]):
                if t == reset_at:
                    gen.reset_streaming(torch.tensor([True, False]))
                steps.append(gen.step(codes[:, :, t : t + 1]))
        if handle:
            handle.remove()
        return steps

    stock, long = generate(None), generate(64)
    assert all(torch.equal(a, b) for a, b in zip(stock, long, strict=True))
    short, reset = generate(6), generate(6, reset_at=15)
    assert any(not torch.equal(a, b) for a, b in zip(stock, short, strict=True))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(short, reset, strict=True))


def greedy(model: LMModel, codes: Tensor, **options) -> list[Tensor]:
    gen = LMGen(model, use_sampling=False, support_out_of_sync=True, **options)
    with gen.streaming(codes.shape[0]):
        return [gen.step(part) for part in codes.split(1, dim=2)]


def test_out_of_sync_rows_each_get_what_they_would_get_alone():
    model = patched_lm()
    codes = random_codes(model, 40, batch=3)[:, 3:]
    alone = [torch.cat(greedy(model, codes[row : row + 1]), dim=2) for row in range(3)]
    generator = torch.Generator().manual_seed(3)
    gen = LMGen(model, use_sampling=False, support_out_of_sync=True)
    position, results = [0] * 3, [[] for _ in range(3)]
    with gen.streaming(3):
        while min(position) < 40:
            active = torch.rand(3, generator=generator) < 0.6
            active &= torch.tensor(position) < 40
            frame = torch.stack([codes[r, :, min(position[r], 39)] for r in range(3)])[..., None]
            gen.set_exec_mask(active)
            out = gen.step(frame)
            for row in active.nonzero().flatten().tolist():
                results[row].append(out[row : row + 1])
                position[row] += 1
    for row in range(3):
        assert torch.equal(torch.cat(results[row], dim=2), alone[row])


def test_speech_to_text_with_extra_heads():
    model = patched_lm(dep_q=0, extra_heads_num_heads=2, extra_heads_dim=3)
    codes = random_codes(model, 30)[:, 1:]
    gen = LMGen(model, use_sampling=False)
    with gen.streaming(2):
        for part in codes.split(1, dim=2):
            result = gen.step_with_extra_heads(part)
    tokens, heads = result
    assert tokens.shape == (2, 1, 1)
    assert [head.shape for head in heads] == [(2, 1, 3)] * 2


def test_training_forward_with_gradient_checkpointing():
    """Checkpointing reruns layers; the functional form gives the same gradients."""
    gradients = []
    for checkpointing in (False, True):
        model = patched_lm(gradient_checkpointing=checkpointing).train()
        codes = random_codes(model, 30)
        output = model(codes)
        loss = output.text_logits[output.text_mask].square().mean()
        loss = loss + output.logits[output.mask].square().mean()
        loss.backward()
        gradients.append([p.grad for p in ttt_cache.adapter_parameters(model)])
    for plain, rerun in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        assert_near(rerun, plain)


def test_hooked_and_wrapped_projections_are_called():
    model = patched_lm()
    calls = []
    for layer in model.transformer.layers:
        layer.self_attn.in_projs[0].register_forward_hook(lambda *_: calls.append("in"))
        layer.self_attn.out_projs[0].register_forward_hook(lambda *_: calls.append("out"))
    temporal(model, random_codes(model, 5))
    assert calls == ["in", "out"] * 3


def test_a_reset_erases_and_heals_a_row():
    model = patched_lm()
    codes = random_codes(model, LENGTH)
    expected = temporal(model, codes)
    with model.streaming(2), torch.no_grad():
        x = model.transformer
        poison = torch.zeros(2, 1, 32)
        poison[0] = float("nan")
        x(poison)
        model.reset_streaming(torch.tensor([True, True]))
        states = [layer.self_attn._streaming_state.cache for layer in x.layers]
        assert all(not t.any() for state in states for _, t in state.tensors())
        logits = [model.forward_text(part)[1][:, 0] for part in codes.split(1, dim=2)]
    assert_near(torch.cat(logits, dim=1), expected)
