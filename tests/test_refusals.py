"""What patch and unpatch refuse, and that nothing has changed then."""

from __future__ import annotations

import pytest
from models import SMALL, attentions, fingerprint, tiny_lm
from moshi.models.compression import MimiModel
from moshi.models.lm import LMGen
from moshi.modules.streaming import StreamingModule
from moshi.modules.transformer import StreamingMultiheadAttention, StreamingTransformer
from torch import nn

import ttt_cache


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"layers": [3]}, ValueError, ["layers", "3"]),
        ({"layers": [-4]}, ValueError, ["layers", "-4"]),
        ({"layers": [0, 0]}, ValueError, ["layers", "once"]),
        ({"layers": [0, -3]}, ValueError, ["layers", "more than once"]),
        ({"layers": []}, ValueError, ["layers", "at least one"]),
        ({"layers": 2}, TypeError, ["layers", "2"]),
        ({"layers": "all"}, TypeError, ["layers", "'all'"]),
        ({"layers": [1.0]}, TypeError, ["layers", "1.0"]),
        ({"layers": [True]}, TypeError, ["layers", "True"]),
        ({"recent": 0}, ValueError, ["recent=0", "read='virtual'", "exclude"]),
        ({"recent": -5}, ValueError, ["recent", "-5"]),
        ({"recent": 2.5}, TypeError, ["recent", "2.5"]),
        ({"recent": True}, TypeError, ["recent", "True"]),
        ({"recent": None}, ValueError, ["recent", "context 64", "recent=64"]),
        ({"recent": 62, "chunk": 4}, ValueError, ["recent", "62", "context 64"]),
        ({"recent": {0: 5}}, ValueError, ["recent", "exactly the patched layers"]),
        ({"recent": {0: 5, 1: 5, 7: 5}}, ValueError, ["recent", "7"]),
        ({"recent": {}}, ValueError, ["recent"]),
        ({"recent": {0: 5, -3: 6, 1: 4, 2: 4}}, ValueError, ["recent", "once"]),
        ({"recent": {0: 5, "0": 6, 1: 4, 2: 4}}, ValueError, ["recent", "once"]),
        ({"recent": {"first": 5}}, TypeError, ["recent", "'first'"]),
        ({"layers": {0: 1}}, TypeError, ["layers"]),
        ({"recent": {0: 5, 1: -1, 2: 5}}, ValueError, ["recent[1]", "-1"]),
        ({"virtual": 0}, ValueError, ["virtual", "0"]),
        ({"chunk": 0}, ValueError, ["chunk", "0"]),
        ({"sinks": -1}, ValueError, ["sinks", "-1", "at least 0"]),
        ({"memory_heads": 0}, ValueError, ["memory_heads"]),
        ({"memory_dim": -1}, ValueError, ["memory_dim"]),
        ({"hidden_dim": "big"}, TypeError, ["hidden_dim", "'big'"]),
        ({"memory": "lstm"}, ValueError, ["memory", "'lstm'", "ttt-mlp"]),
        ({"memory": None}, TypeError, ["memory", "None"]),
        ({"gate": "open"}, ValueError, ["gate", "'open'", "joint"]),
        ({"alpha": 1.5}, ValueError, ["alpha", "1.5", "[0, 1]"]),
        ({"alpha": float("nan")}, ValueError, ["alpha", "nan"]),
        ({"alpha": "half"}, TypeError, ["alpha", "'half'"]),
        ({"bptt": 0}, ValueError, ["bptt", "0"]),
        ({"reecnt": 5}, TypeError, ["reecnt", "recent"]),
        ({"config": {"recent": 5}}, TypeError, ["config", "CacheConfig"]),
        ({"config": ttt_cache.CacheConfig(), "recent": 5}, TypeError, ["config", "recent"]),
    ],
)
def test_bad_settings_are_refused_and_nothing_changes(settings, error, words):
    model = tiny_lm()
    before = fingerprint(model)
    with pytest.raises(error) as caught:
        ttt_cache.patch(model, **settings)
    assert type(caught.value) is error
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (lambda: "moshi", TypeError, ["model", "str"]),
        (lambda: nn.Linear(2, 2), ValueError, ["model", "Linear", "none"]),
        (lambda: nn.ModuleList([tiny_lm(), tiny_lm()]), ValueError, ["model", "0.transformer"]),
        (lambda: tiny_lm(causal=False).transformer, ValueError, ["layer 0", "not causal"]),
        (lambda: tiny_lm(context=None), ValueError, ["layer 0", "context"]),
        (lambda: tiny_lm().depformer, ValueError, ["layer 0", "weights_per_step"]),
    ],
)
def test_models_that_cannot_be_patched(model, error, words):
    with pytest.raises(error) as caught:
        ttt_cache.patch(model())
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_layers_that_cannot_be_patched_are_refused_before_anything_changes():
    model = tiny_lm()
    last = attentions(model)[2]
    for change, word in (("causal", "causal"), ("context", "context"), ("in_projs", "older moshi")):
        kept = getattr(last, change)
        if change == "in_projs":
            delattr(last, change)
        else:
            setattr(last, change, None)
        before = fingerprint(model)
        with pytest.raises(ValueError, match=f"layer 2.*{word}"):
            ttt_cache.patch(model, **SMALL)
        assert fingerprint(model) == before
        setattr(last, change, kept)

    class Custom(StreamingMultiheadAttention):
        pass

    last.__class__ = Custom
    with pytest.raises(ValueError, match=r"layer 2.*Custom"):
        ttt_cache.patch(model, **SMALL)


def test_patching_twice_or_while_streaming_is_refused():
    model = tiny_lm()
    handle = ttt_cache.patch(model, layers=[0], **SMALL)
    before = fingerprint(model)
    for layers in ([0], [1], None):
        with pytest.raises(RuntimeError, match="patched already"):
            ttt_cache.patch(model, layers=layers, **SMALL)
    assert fingerprint(model) == before
    with model.streaming(1):
        with pytest.raises(RuntimeError, match="streaming"):
            handle.remove()
        with pytest.raises(RuntimeError, match="streaming"):
            ttt_cache.unpatch(model)
    handle.remove()
    model.transformer.set_streaming_detached(True)
    with model.streaming(1), pytest.raises(RuntimeError, match="streaming"):
        ttt_cache.patch(model, **SMALL)
    model.transformer.set_streaming_detached(False)
    model._cached_children = None
    with LMGen(model).streaming(1):
        before = fingerprint(model)
        with pytest.raises(RuntimeError, match="streaming"):
            ttt_cache.patch(model, **SMALL)
        assert fingerprint(model) == before


def test_a_streaming_neighbour_does_not_matter():
    model = tiny_lm()
    neighbour = StreamingTransformer(8, 2, 1, 16, causal=True, context=9)
    box = nn.ModuleDict({"model": model})
    box.neighbour = neighbour.requires_grad_(False)
    with neighbour.streaming(1), pytest.raises(ValueError, match="holds 2"):
        ttt_cache.patch(box, **SMALL)
    mimi = MimiModel.__new__(MimiModel)  # without its 80 million weights
    StreamingModule.__init__(mimi)
    mimi.encoder_transformer = neighbour
    box.neighbour = mimi
    with neighbour.streaming(1), ttt_cache.patch(box, **SMALL) as handle:
        assert handle.transformer is model.transformer


def test_adapter_parameters_need_a_patch():
    with pytest.raises(RuntimeError, match="not patched"):
        ttt_cache.adapter_parameters(tiny_lm())
