"""Patching and unpatching: what changes and what must not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import (
    SMALL,
    assert_near,
    attentions,
    fingerprint,
    random_codes,
    stir,
    streamed,
    temporal,
    tiny_lm,
)
from moshi.models.lm import LMGen
from moshi.modules.transformer import (
    ProjectedTransformer,
    StreamingMultiheadAttention,
    StreamingTransformer,
)
from torch import nn

import ttt_cache
from ttt_cache.patched import PatchedAttention
from ttt_cache.windowed import turns_once


@pytest.mark.parametrize("streamed_before", [False, True])
def test_removal_restores_the_model_exactly(streamed_before):
    model = tiny_lm()
    codes = random_codes(model, 40)
    attentions(model)[1].register_forward_hook(lambda module, args, output: None)
    if streamed_before:  # fills _cached_children
        streamed(model, codes)
    before, weights, expected = fingerprint(model), copy.deepcopy(model.state_dict()), model(codes)
    handle = ttt_cache.patch(model, **SMALL)
    stir(model)
    streamed(model, codes)
    handle.remove()
    assert fingerprint(model) == before
    after = model.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    result = model(codes)
    assert torch.equal(result.text_logits, expected.text_logits)
    assert torch.equal(result.logits.nan_to_num(), expected.logits.nan_to_num())
    handle.remove()  # a second time changes nothing
    assert fingerprint(model) == before


def test_context_manager_and_unpatch_remove():
    model = tiny_lm()
    with ttt_cache.patch(model, **SMALL) as handle:
        assert handle.layers == (0, 1, 2)
        assert all(type(a) is PatchedAttention for a in attentions(model))
    assert all(type(a) is StreamingMultiheadAttention for a in attentions(model))
    ttt_cache.patch(model, **SMALL)
    ttt_cache.unpatch(model)
    assert all(type(a) is StreamingMultiheadAttention for a in attentions(model))
    with pytest.raises(RuntimeError, match="not patched"):
        ttt_cache.unpatch(model)


def test_only_the_named_layers_change_and_the_depformer_never():
    model = tiny_lm()
    before = fingerprint(model.depformer)
    handle = ttt_cache.patch(model, layers=[-1, 0], **SMALL)
    assert handle.layers == (2, 0)
    kinds = [type(a) for a in attentions(model)]
    assert kinds == [PatchedAttention, StreamingMultiheadAttention, PatchedAttention]
    assert fingerprint(model.depformer) == before
    adapter = {id(p) for p in ttt_cache.adapter_parameters(model)}
    named = {n for n, p in model.named_parameters() if id(p) in adapter}
    assert named == {n for n, _ in model.named_parameters() if ".self_attn.ttt_cache." in n}
    assert {n.split(".self_attn.")[0] for n in named} == {f"transformer.layers.{i}" for i in (0, 2)}


def test_containers_of_one_transformer():
    model = tiny_lm()
    for container in (model, model.transformer, LMGen(model), nn.ModuleDict({"inner": model})):
        with ttt_cache.patch(container, **SMALL) as handle:
            assert handle.transformer is model.transformer


def test_mimi_transformer_only_when_given_itself():
    torch.manual_seed(0)
    options = {"causal": True, "context": 20, "positional_embedding": "rope"}
    projected = ProjectedTransformer(
        16, (16,), 16, num_heads=2, num_layers=2, conv_layout=True, **options
    ).eval()
    x = torch.randn(2, 16, 60)
    with ttt_cache.patch(projected, **SMALL), torch.no_grad():
        stir(projected)
        (expected,) = projected(x)
        with projected.streaming(2):  # Mimi makes calls of two frames
            parts = [projected(part)[0] for part in x.split(2, dim=2)]
    assert_near(torch.cat(parts, dim=2), expected)


def test_cross_attention_is_left_alone():
    torch.manual_seed(0)
    model = StreamingTransformer(
        32, 4, 2, 64, causal=True, context=64, positional_embedding="rope", cross_attention=True
    ).eval()
    before = [fingerprint(layer.cross_attention) for layer in model.layers]
    x, source = torch.randn(2, 50, 32), torch.randn(2, 7, 32)
    with ttt_cache.patch(model, **SMALL), torch.no_grad():
        stir(model)
        assert [fingerprint(layer.cross_attention) for layer in model.layers] == before
        expected = model(x, cross_attention_src=source)
        with model.streaming(2):
            parts = [model(part, cross_attention_src=source) for part in x.split(1, dim=1)]
        assert_near(torch.cat(parts, dim=1), expected)


def test_the_users_own_error_is_not_hidden_by_one_of_removal():
    model = tiny_lm()
    with pytest.raises(KeyError, match="own"), ttt_cache.patch(model, **SMALL):
        model.streaming_forever(1)
        raise KeyError("own")


def test_a_stock_streaming_state_is_refused_by_a_patched_model():
    model = tiny_lm()
    with model.streaming(1):
        stock = model.get_streaming_state()
    ttt_cache.patch(model, **SMALL)
    with model.streaming(1):
        model.set_streaming_state(stock)
        with pytest.raises(RuntimeError, match="before the model was patched"):
            temporal(model, random_codes(model, 1, batch=1))


def test_per_layer_settings():
    model = tiny_lm()
    per_layer = {"recent": {0: 5, 2: 9}, "virtual": {0: 1, -1: 4}, "gate": {0: "head", 2: "joint"}}
    handle = ttt_cache.patch(model, layers=[0, 2], **(SMALL | per_layer))
    assert [handle.caches[i].window.recent for i in (0, 2)] == [5, 9]
    assert [handle.caches[i].reader.slots for i in (0, 2)] == [1, 4]
    assert [handle.caches[i].gate.kind for i in (0, 2)] == ["head", "joint"]
    stir(model)
    codes = random_codes(model, 50)
    assert_near(streamed(model, codes), temporal(model, codes))


def test_deepcopy_of_a_patched_model_is_independent():
    model = tiny_lm()
    ttt_cache.patch(model, **SMALL)
    stir(model)
    twin = copy.deepcopy(model)
    codes = random_codes(model, 40)
    expected = temporal(model, codes)
    ttt_cache.unpatch(model)
    assert torch.equal(temporal(twin, codes), expected)
    ttt_cache.unpatch(twin)
    assert torch.equal(temporal(twin, codes), temporal(model, codes))


def test_a_copy_of_the_transformer_does_not_bring_the_model_along():
    model = tiny_lm()
    plain = len(pickle.dumps(model.transformer))
    ttt_cache.patch(model, layers=[0], **SMALL)
    adapter = sum(p.numel() * p.element_size() for p in ttt_cache.adapter_parameters(model))
    assert len(pickle.dumps(model.transformer)) < plain + adapter + 10_000
    twin = pickle.loads(pickle.dumps(model.transformer))
    ttt_cache.unpatch(twin)


def test_dtype_changes_leave_the_fast_weights():
    model = tiny_lm()
    handle = ttt_cache.patch(model, **SMALL)
    stir(model)
    memory = handle.caches[0].memory
    before = [p.clone() for p in memory.fast.parameters()]
    for narrow in (model.bfloat16, model.half, lambda: model.to(torch.bfloat16)):
        narrow()
        assert memory.project.dtype in (torch.bfloat16, torch.float16)
        pairs = zip(before, memory.fast.parameters(), strict=True)
        assert all(now.dtype == torch.float32 and torch.equal(old, now) for old, now in pairs)
    model.bfloat16()
    codes = random_codes(model, 30)
    assert streamed(model, codes).isfinite().all()
    assert handle.caches[0].init_state(1).memory["w2"].dtype == torch.float32


def test_autocast_does_not_narrow_the_inner_update():
    model = tiny_lm()
    handle = ttt_cache.patch(model, layers=[0], **SMALL)
    q, k, v = torch.randn(3, 2, 4, 30, 8)
    x = torch.randn(2, 30, 32)
    cache = handle.caches[0]
    with torch.autocast("cpu", torch.bfloat16):
        _, state = cache(q, k, v, x)
    assert all(t.dtype == torch.float32 for t in state.memory.values())
    ring = cache.init_state(2)
    with torch.autocast("cpu", torch.bfloat16):
        for one, hidden in zip(
            torch.stack([q, k, v]).split(1, dim=3), x.split(1, dim=1), strict=True
        ):
            cache.stream(*one, hidden, ring)
    assert all(t.dtype == torch.float32 for t in ring.memory.values())


@pytest.mark.parametrize(
    "settings", [{}, {"memory": "none"}, {"memory": "cluster"}, {"sinks": 2}, {"read": "query"}]
)
def test_a_step_under_autocast_is_the_step(settings):
    """Projections are narrow there, the ring is not."""
    model = tiny_lm()
    ttt_cache.patch(model, **(SMALL | settings))
    stir(model)
    codes = random_codes(model, 20)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = streamed(model, codes)
    wide = streamed(model, codes)
    assert (narrow.float() - wide).abs().max() < 0.1 * wide.abs().max()


@pytest.mark.parametrize("source", ["hidden", "kv"])
def test_the_in_projection_gets_the_gradients_of_what_it_packs(source):
    """Left side by side by the blocks (`hidden`), or added up from several uses (`kv`)."""
    model = tiny_lm()
    ttt_cache.patch(model, **SMALL, source=source)
    stir(model)
    attention = attentions(model)[0]
    assert isinstance(attention, PatchedAttention)
    weight, x = attention.in_projs[0].weight, torch.randn(2, 40, attention.embed_dim)
    target = torch.randn_like(x)

    def gradient() -> torch.Tensor:
        return torch.autograd.grad((attention(x, x, x) * target).sum(), weight)[0]

    packed = gradient()

    def split(x: torch.Tensor) -> list[torch.Tensor]:
        width = attention.embed_dim // attention.num_heads
        parts = attention.in_projs[0](x).chunk(3, dim=-1)
        return [part.unflatten(-1, (-1, width)).transpose(1, 2) for part in parts]

    attention._project = split
    assert_near(packed, gradient())


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("start", [0, 40])
def test_keys_turned_in_blocks_or_once_are_the_same(monkeypatch, once, start):
    """A wide window turns its keys once: outputs, state and gradients do not notice."""
    model = tiny_lm()
    cache = ttt_cache.patch(model, layers=[0], sinks=2, **SMALL).caches[0]
    stir(model)
    q, k, v = torch.randn(3, 2, 4, start + 150, 8)
    x, target = torch.randn(2, start + 150, 32), torch.randn(2, 4, 150, 8)

    def outcome() -> list[torch.Tensor]:
        leaves = [z.clone().requires_grad_() for z in (q, k, v)]
        state = None
        if start:
            _, state = cache(*(z[:, :, :start] for z in leaves), x[:, :start])
        y, state = cache(*(z[:, :, start:] for z in leaves), x[:, start:], state)
        loss = (y * target).sum() + state.keys.square().sum()
        return [y, state.keys, state.sink_keys, *torch.autograd.grad(loss, leaves)]

    expected = outcome()
    monkeypatch.setattr("ttt_cache.windowed.BLOCK", 0 if once else 1000)
    for found, known in zip(outcome(), expected, strict=True):
        assert_near(found, known)


def test_a_window_of_many_blocks_turns_its_keys_once():
    model = tiny_lm()
    for recent, once in ((100, False), (1000, True)):
        with ttt_cache.patch(model, recent=recent, memory="none") as handle:
            assert turns_once(handle.caches[0]) == once


@pytest.mark.parametrize("memory", [{}, {"memory": "ttt-linear"}, {"depth": 3}])
def test_the_way_back_may_run_under_autocast(memory):
    model = tiny_lm()
    handle = ttt_cache.patch(model, layers=[0], **SMALL, **memory)
    q, k, v = torch.randn(3, 2, 4, 30, 8)
    cache, x = handle.caches[0], torch.randn(2, 30, 32)
    with torch.autocast("cpu", torch.bfloat16):
        cache(q, k, v, x)[0].float().square().sum().backward()
    gradients = [p.grad for p in cache.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients)


def test_the_way_back_on_the_meta_device():
    handle = ttt_cache.patch(tiny_lm(), layers=[0], **SMALL)
    cache = handle.caches[0].to("meta")
    q, k, v = torch.randn(3, 2, 4, 150, 8, device="meta")
    cache(q, k, v, torch.randn(2, 150, 32, device="meta"))[0].sum().backward()
    assert cache.memory.project.grad.shape == cache.memory.project.shape
