"""Parity with stock on a checkpoint in Moshi's own file formats, through `CheckpointInfo`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import TINY, assert_near, random_codes, streamed, temporal, tiny_lm
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo
from safetensors.torch import save_file

import ttt_cache

CONTEXT = 120  # more than recent + chunk - 1 of the default settings


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> CheckpointInfo:
    folder = tmp_path_factory.mktemp("checkpoint")
    changes = {"context": CONTEXT, "num_layers": 2}
    model = tiny_lm(**changes)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = TINY | changes | {"moshi_name": "model.safetensors", "model_type": "moshi"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("mimi.safetensors", "tokenizer.model"):  # located, never read here
        (folder / name).touch()
    return CheckpointInfo.from_hf_repo(
        "local/only",
        moshi_weights=folder / "model.safetensors",
        mimi_weights=folder / "mimi.safetensors",
        tokenizer=folder / "tokenizer.model",
        config_path=Path(folder / "config.json"),
    )


def load(checkpoint: CheckpointInfo) -> LMModel:
    return checkpoint.get_moshi(device="cpu", dtype=torch.float32)


def test_default_settings_are_stock_up_to_the_first_eviction(checkpoint):
    model = load(checkpoint)
    codes = random_codes(model, 140)
    stock, stock_streamed = temporal(model, codes), streamed(model, codes)
    ttt_cache.patch(model)
    defaults = ttt_cache.CacheConfig().window
    until = defaults.recent + defaults.chunk - 1  # the last token before the first eviction
    assert_near(temporal(model, codes)[:, :until], stock[:, :until])
    assert_near(streamed(model, codes)[:, :until], stock_streamed[:, :until])
    after = slice(until, CONTEXT)
    assert not torch.allclose(temporal(model, codes)[:, after], stock[:, after], atol=1e-4)


@pytest.mark.parametrize("length", [CONTEXT - 1, CONTEXT, 3 * CONTEXT + 7])
def test_a_window_of_the_context_is_stock_at_any_length(checkpoint, length):
    model = load(checkpoint)
    codes = random_codes(model, length)
    stock, stock_streamed = temporal(model, codes), streamed(model, codes)
    ttt_cache.patch(model, memory="none", recent=CONTEXT)
    assert_near(temporal(model, codes), stock)
    assert_near(streamed(model, codes), stock_streamed)


def test_a_window_may_exceed_the_context_without_memory(checkpoint):
    """The extended-context control: stock Moshi with a larger context."""
    model = load(checkpoint)
    codes = random_codes(model, 300)
    with ttt_cache.patch(model, memory="none", recent=200):
        extended = streamed(model, codes)
    for layer in model.transformer.layers:
        layer.self_attn.context = 200
    assert_near(extended, streamed(model, codes))


def test_an_adapter_fits_the_reloaded_checkpoint(checkpoint, tmp_path):
    model = load(checkpoint)
    codes = random_codes(model, 150)
    ttt_cache.patch(model, recent=20)
    with torch.no_grad():
        for parameter in ttt_cache.adapter_parameters(model):
            parameter.add_(torch.randn_like(parameter))
    expected = temporal(model, codes)
    ttt_cache.save_adapter(model, tmp_path, base_model="local/only")
    again = load(checkpoint)
    ttt_cache.load_adapter(again, tmp_path)
    assert torch.equal(temporal(again, codes), expected)
