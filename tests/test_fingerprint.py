"""What tells models apart: every tensor, how a model is built, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from models import SMALL, random_codes, stir, streamed, tiny_lm
from moshi.modules.lora import replace_all_linear_with_lora, replace_lora_with_linear
from torch import nn

import ttt_cache
from ttt_cache import fingerprint


def patched(**changes):
    model = tiny_lm(num_layers=1, **changes)
    ttt_cache.patch(model, **SMALL)
    stir(model)
    return model


def everything(model: nn.Module) -> tuple[str, str, str]:
    base, adapter = fingerprint.weights(model), fingerprint.weights(model, adapter=True)
    return fingerprint.structure(model), base, adapter


def test_every_tensor_counts():
    """A training step changes nearly all values of a tensor: one of them that changes is seen."""
    model = patched()
    structure, base, adapter = everything(model)
    for name, tensor in model.state_dict().items():
        before = tensor.clone()
        tensor.add_(1)
        ours = "ttt_cache" in name
        assert (fingerprint.weights(model) == base) is ours, name
        assert (fingerprint.weights(model, adapter=True) == adapter) is not ours, name
        tensor.copy_(before)
    assert everything(model) == (structure, base, adapter)


def test_samples_are_of_all_of_a_tensor():
    model = nn.Linear(400, 300, bias=False)
    before = fingerprint.weights(model)
    weight = model.weight
    for part in (weight[-20:], weight[:20], weight[:, :20], weight[:, -20:]):
        with torch.no_grad():
            part.add_(1)
        assert fingerprint.weights(model) != before
        before = fingerprint.weights(model)


def test_nothing_but_the_model_counts():
    model = patched()
    before = everything(model)
    streamed(model, random_codes(model, 20))
    assert everything(model) == before
    assert everything(copy.deepcopy(model)) == before
    assert everything(model.train()) == before
    assert fingerprint.structure(model.to("meta")) == before[0]
    ttt_cache.unpatch(model)
    assert fingerprint.structure(model) == before[0]


@pytest.mark.parametrize(
    "changes",
    [{"max_period": 9000}, {"context": 63}, {"norm": "rms_norm"}, {"dtype": torch.bfloat16},
     {"delays": [0, 0, 1, 1, 1]}, {"num_heads": 2}],
)  # fmt: skip
def test_how_a_model_is_built_counts(changes):
    assert fingerprint.structure(tiny_lm(**changes)) != fingerprint.structure(tiny_lm())


def test_lora_counts_before_and_after_it_is_fused():
    found = [everything(tiny_lm())[:2]]
    for scale in (0.0, 0.1, 0.2):
        model = tiny_lm()
        replace_all_linear_with_lora(model, rank=2, scaling=2.0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.constant_(parameter, scale)
            elif "lora_A" in name:
                nn.init.ones_(parameter)
        found.append(everything(model)[:2])
        replace_lora_with_linear(model)
        if scale:
            found.append(everything(model)[:2])
    assert len(set(found)) == len(found)


def test_tensors_of_any_kind():
    """Quantised, empty, not contiguous, single numbers, and those without values."""
    model = nn.Module()
    model.register_buffer("quantised", torch.arange(999, dtype=torch.int8))
    model.register_buffer("empty", torch.zeros(3, 0))
    model.register_buffer("turned", torch.randn(40, 30).t())
    model.register_buffer("single", torch.tensor(2.0))
    before = fingerprint.weights(model)
    for change in (lambda: model.quantised.neg_(), lambda: model.turned.neg_(),
                   lambda: model.single.neg_()):  # fmt: skip
        change()
        assert fingerprint.weights(model) != before
        change()
    assert fingerprint.weights(model) == before
    assert fingerprint.weights(model.to("meta")) != before
