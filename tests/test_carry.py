"""Training by segments: states go on, and the losses are moshi-finetune's."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models import SMALL, random_codes, stir, tiny_lm
from moshi.models.lm_utils import _delay_sequence
from moshi.modules.transformer import StreamingMultiheadAttention

import ttt_cache
from ttt_cache.patch import require_patch
from ttt_cache.patched import PatchedAttention
from ttt_cache.targets import attention_of
from ttt_cache.training.carry import Carry, memory_reset, window_only
from ttt_cache.training.data import LMFacts
from ttt_cache.training.loss import Weights, cross_entropy, divergence, predict, targets

CONTEXT = 24
ALL = torch.tensor([True, True])
NONE = torch.tensor([False, False])


def model_of(layers=(1,), checkpointing=False, **settings):
    model = tiny_lm(context=CONTEXT)
    torch.manual_seed(3)
    ttt_cache.patch(model, layers=layers, **(SMALL | settings))
    stir(model)
    model.transformer.checkpointing = checkpointing
    return model


def delayed(model, codes):
    """As `LMModel.forward` delays a whole recording, its initial tokens in front."""
    initial = model._get_initial_token().expand(len(codes), -1, -1)
    return torch.cat([initial, _delay_sequence(model.delays, codes, initial)], dim=2)


def by_segments(model, codes, lengths, carry, fresh=None):
    """Text logits of consecutive segments."""
    out, start = [], 0
    for index, length in enumerate(lengths):
        with carry.segment((ALL if index == 0 else NONE) if fresh is None else fresh[index]):
            out.append(predict(model, codes[:, :, start : start + length + 1]).text)
        start += length
    return torch.cat(out, dim=1)


@given(cuts=st.lists(st.integers(1, 30), min_size=1, max_size=5), checkpointing=st.booleans())
def test_segments_are_one_forward_pass(cuts, checkpointing):
    model = model_of(checkpointing=checkpointing)
    codes = random_codes(model, sum(cuts))
    with torch.no_grad():
        whole = model(codes).text_logits[:, 0]
        parts = by_segments(model, delayed(model, codes), cuts, Carry(require_patch(model)))
    assert torch.allclose(parts, whole, atol=1e-5 * whole.abs().max())


def test_a_fresh_row_starts_anew_and_leaves_the_other_alone():
    model = model_of()
    first, second = random_codes(model, 40), random_codes(model, 20, seed=5)
    long = delayed(model, first)
    short = delayed(model, second)
    switched = long[:, :, 20:41].clone()
    switched[1] = short[1]
    carry = Carry(require_patch(model))
    with torch.no_grad():
        with carry.segment(ALL):
            predict(model, long[:, :, :21])
        with carry.segment(torch.tensor([False, True])):
            got = predict(model, switched).text
        expected = torch.stack(
            [model(first).text_logits[0, 0, 20:], model(second).text_logits[1, 0]]
        )
    assert torch.allclose(got, expected, atol=1e-5 * expected.abs().max())


def test_states_survive_a_checkpoint():
    model = model_of()
    codes = delayed(model, random_codes(model, 40))
    carry, later = (Carry(require_patch(model)) for _ in range(2))
    with torch.no_grad():
        by_segments(model, codes, [20], carry)
        later.load({name: tensor.clone() for name, tensor in carry.tensors().items()}, 2)
        rest = [by_segments(model, codes[:, :, 20:], [20], c, [NONE]) for c in (carry, later)]
    assert torch.equal(*rest)
    broken = dict(carry.tensors())
    name, tensor = broken.popitem()
    with pytest.raises(ValueError, match="must be of shape"):
        later.load(broken, 2)
    with pytest.raises(ValueError, match="must be of shape"):
        later.load(broken | {name: tensor[:1]}, 2)


@pytest.mark.parametrize("layers", [(1,), (0, 1, 2)])
def test_gradients_are_those_of_the_segment_alone_and_survive_checkpointing(layers):
    """The first segment is cut off: its state is data. Checkpointing changes nothing."""
    found = []
    for checkpointing in (False, True):
        model = model_of(layers, checkpointing)
        codes = delayed(model, random_codes(model, 30))
        carry = Carry(require_patch(model))
        with carry.segment(ALL):
            predict(model, codes[:, :, :17])
        assert all(not t.requires_grad for t in carry.tensors().values())
        before = {name: tensor.clone() for name, tensor in carry.tensors().items()}
        with carry.segment(NONE):
            predict(model, codes[:, :, 16:]).text.square().mean().backward()
            states = carry.tensors()
            assert all(torch.equal(states[name], tensor) for name, tensor in before.items())
        assert not torch.equal(carry.tensors()["1.memory.w2"], before["1.memory.w2"])
        found.append([p.grad for p in ttt_cache.adapter_parameters(model)])
    for plain, again in zip(*found, strict=True):
        assert (plain is None and again is None) or torch.allclose(plain, again, atol=1e-6)
    assert any(grad is not None and grad.abs().max() > 0 for grad in found[0])


def test_an_exception_keeps_states_and_model():
    model = model_of()
    codes = delayed(model, random_codes(model, 30))
    carry = Carry(require_patch(model))
    expected = predict(model, codes).text
    with carry.segment(ALL):
        predict(model, codes[:, :, :11])
    before = carry.states
    with pytest.raises(KeyboardInterrupt), carry.segment(NONE):
        predict(model, codes[:, :, 10:])
        raise KeyboardInterrupt
    assert carry.states is before
    kinds = [type(attention_of(model.transformer, layer)) for layer in range(3)]
    assert kinds == [StreamingMultiheadAttention, PatchedAttention, StreamingMultiheadAttention]
    assert torch.equal(predict(model, codes).text, expected)
    assert not any("ttt_cache" in n for n in model.state_dict() if "layers.1" not in n)


def test_a_streaming_model_or_sinusoidal_positions_are_refused():
    model = model_of()
    carry = Carry(require_patch(model))
    with (
        model.streaming(2),
        pytest.raises(RuntimeError, match="cannot be trained while it is streaming"),
        carry.segment(ALL),
    ):
        pass
    model = tiny_lm(positional_embedding="sin")
    with pytest.raises(ValueError, match="positional_embedding='sin'"):
        Carry(ttt_cache.patch(model, **SMALL))


def test_controls():
    """Full context is stock, the window alone a patch without memory; reset reads no memory."""
    model = model_of()
    codes = random_codes(model, 60)
    handle = require_patch(model)
    wide = delayed(model, codes)
    most = SMALL["recent"] + SMALL["chunk"] - 1
    with torch.no_grad():
        full = by_segments(model, wide, [25, 35], Carry(handle, {}))
        window = by_segments(model, wide, [25, 35], Carry(handle, window_only(handle)))
        reset = by_segments(model, wide, [25, 35], Carry(handle, memory_reset(handle)))
        trained = by_segments(model, wide, [25, 35], Carry(handle))
        handle.remove()
        stock = model(codes).text_logits[:, 0]
        with ttt_cache.patch(model, layers=[1], memory="none", recent=most):
            alone = model(codes).text_logits[:, 0]
        with ttt_cache.patch(model, layers=[1], **SMALL, reset_memory=True):
            never = model(codes).text_logits[:, 0]
    for got, expected in ((full, stock), (window, alone), (reset, never)):
        assert torch.allclose(got, expected, atol=1e-5 * expected.abs().max())
    assert not torch.allclose(trained, never, atol=1e-3)
    for preset in ("ttt-mlp-layer", "window"):
        handle = ttt_cache.patch(tiny_lm(), preset=preset)
        assert window_only(handle) is None and memory_reset(handle) is None


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({}, {0: 9, 1: 9}),
        ({"recent": {0: 5, 1: 9}, "chunk": 3, "sinks": 2}, {0: 7, 1: 11}),
        ({"chunk": 1}, {0: 6, 1: 6}),
        ({"write": "arrived"}, {0: 6, 1: 6}),
        ({"preset": "hybrid", "recent": None}, {0: CONTEXT, 1: CONTEXT}),
        ({"memory": "mean", "recent": None, "chunk": 1}, {0: CONTEXT, 1: CONTEXT}),
    ],
)
def test_window_only_sees_as_many_frames_as_the_patch_at_most(settings, most):
    """So it is not beaten for want of frames."""
    handle = require_patch(model_of((0, 1), **settings))
    caches = window_only(handle)
    assert {layer: cache.window.capacity for layer, cache in caches.items()} == most
    assert {layer: cache.window.capacity for layer, cache in handle.caches.items()} == most
    assert all(cache.memory is None for cache in caches.values())
    assert all(cache.window.sinks == settings.get("sinks", 0) for cache in caches.values())


@pytest.mark.parametrize("settings", [{"chunk": 1}, {"write": "arrived"}], ids=str)
def test_where_no_frame_waits_both_controls_are_one(settings):
    model = model_of(**settings)
    wide, handle = delayed(model, random_codes(model, 40)), require_patch(model)
    arms = (window_only(handle), memory_reset(handle))
    with torch.no_grad():
        window, reset = (by_segments(model, wide, [15, 25], Carry(handle, arm)) for arm in arms)
    assert torch.allclose(window, reset, atol=1e-5 * window.abs().max())


def finetune_loss(model, codes, first, padding):
    """moshi-finetune's loss of a whole recording, from Moshi's own forward pass and masks."""
    out = model(codes)

    def mean(logits, target, mask, weight):
        logits, target, weight = logits[mask], target[mask], weight[mask]
        each = F.cross_entropy(logits, target, reduction="none")
        return (each * weight).sum() / weight.sum()

    text, audio = codes[:, :1], codes[:, 1 : 1 + model.dep_q]
    pads = (text == model.text_padding_token_id) | (text == model.end_of_text_padding_id)
    text_weight = torch.where(pads, padding, 1.0)
    audio_weight = torch.ones(audio.shape)
    audio_weight[:, 0] = first
    return (
        mean(out.text_logits, text, out.text_mask, text_weight),
        mean(out.logits, audio, out.mask, audio_weight),
    )


@pytest.mark.parametrize("missing", [False, True])
def test_the_loss_is_that_of_moshi_finetune(missing):
    model = model_of()
    codes = random_codes(model, 30)
    codes[:, 0, ::3] = model.text_padding_token_id
    codes[:, 0, ::5] = model.end_of_text_padding_id
    if missing:
        codes[1, :, 21:] = model.zero_token_id
    with torch.no_grad():
        expected = finetune_loss(model, codes, 10.0, 0.3)
        wide = delayed(model, codes)
        logits = predict(model, wide)
        t = targets(LMFacts.of(model), wide, Weights(first_codebook=10.0, text_padding=0.3))
        text = cross_entropy(logits.text, t.text, t.text_weight) / t.text_weight.sum()
        audio = cross_entropy(logits.audio, t.audio, t.audio_weight) / t.audio_weight.sum()
    assert torch.allclose(text, expected[0], rtol=1e-5)
    assert torch.allclose(audio, expected[1], rtol=1e-5)


def test_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    expected = 2 * (p * (p / q).log()).sum(-1)[0]
    weight = torch.tensor([2.0, 5.0])
    assert torch.allclose(divergence(q.log(), p.log(), weight), expected)
    assert divergence(q.log().fill_(float("nan")), p.log(), torch.zeros(2)) == 0
