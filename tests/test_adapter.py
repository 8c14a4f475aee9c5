"""Adapters on disk: what is written, what is restored, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from models import SMALL, random_codes, stir, temporal, tiny_lm
from safetensors.torch import load_file, save_file

import ttt_cache
from ttt_cache import adapter


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter, and the model it belongs to."""
    model = tiny_lm()
    ttt_cache.patch(model, layers=[0, 2], **SMALL)
    stir(model)
    return ttt_cache.save_adapter(model, tmp_path / "adapter"), model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"memory": "mean", "gate": "query"},
        {"memory": "random", "gate": "layer"},
        {"memory": "none", "sinks": 2},
        {"recent": {0: 5, 2: 9}, "virtual": {0: 1, 2: 4}, "gate": {0: "head", 2: "residual"}},
        {"gate": "fixed", "alpha": 0.25, "bptt": 3},
    ],
)
def test_round_trip(tmp_path, settings):
    model = tiny_lm()
    handle = ttt_cache.patch(model, layers=[0, -1], **(SMALL | settings))
    stir(model)
    folder = ttt_cache.save_adapter(model, tmp_path, base_model="somebody/moshi")
    assert sorted(p.name for p in folder.iterdir()) == [adapter.CONFIG_NAME, adapter.WEIGHTS_NAME]
    assert json.loads((folder / adapter.CONFIG_NAME).read_text())["base_model_name_or_path"] == (
        "somebody/moshi"
    )
    other = tiny_lm()
    restored = ttt_cache.load_adapter(other, folder)
    assert restored.config == handle.config
    codes = random_codes(model, 40)
    assert torch.equal(temporal(other, codes), temporal(model, codes))


def test_only_the_adapter_is_written(saved):
    folder, model = saved
    names = set(load_file(folder / adapter.WEIGHTS_NAME))
    wanted = {n for n in model.state_dict() if ".ttt_cache." in n}
    assert {n.split(".")[1] for n in names} == {"0", "2"}
    assert len(names) == len(wanted)


def test_the_recorded_name_of_the_base_model_may_be_edited(saved):
    folder, _ = saved
    path = folder / adapter.CONFIG_NAME
    described = json.loads(path.read_text()) | {"base_model_name_or_path": "renamed/moshi"}
    path.write_text(json.dumps(described))
    ttt_cache.load_adapter(tiny_lm(), folder)


def test_a_bfloat16_model_keeps_float32_fast_weights_on_disk(tmp_path):
    model = tiny_lm().bfloat16()
    ttt_cache.patch(model, **SMALL)
    folder = ttt_cache.save_adapter(model, tmp_path)
    dtypes = {
        name.split(".", 2)[2]: t.dtype
        for name, t in load_file(folder / adapter.WEIGHTS_NAME).items()
    }
    assert dtypes["memory.fast.w1"] == torch.float32
    assert dtypes["memory.project"] == torch.bfloat16


def test_a_window_of_the_context_follows_the_model_it_is_loaded_into(tmp_path):
    model = tiny_lm()
    ttt_cache.patch(model, preset="hybrid", chunk=4)
    folder = ttt_cache.save_adapter(model, tmp_path)
    handle = ttt_cache.load_adapter(tiny_lm(context=48), folder)
    assert {cache.window.recent for cache in handle.caches.values()} == {48}


def test_a_hub_id_works_where_a_folder_does(saved, monkeypatch):
    folder, model = saved

    def download(repo_id, filename):
        assert repo_id == "somebody/adapter"
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    other = tiny_lm()
    ttt_cache.load_adapter(other, "somebody/adapter")
    codes = random_codes(model, 40)
    assert torch.equal(temporal(other, codes), temporal(model, codes))


@pytest.mark.parametrize("failing", [adapter.WEIGHTS_NAME, adapter.CONFIG_NAME])
def test_an_interrupted_save_leaves_the_old_adapter(saved, monkeypatch, failing):
    folder, _ = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    model = tiny_lm()
    ttt_cache.patch(model, recent=9)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if failing == adapter.WEIGHTS_NAME:
        monkeypatch.setattr(adapter, "save_file", full_disk)
    else:
        monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        ttt_cache.save_adapter(model, folder)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def truncate(folder):
    path = folder / adapter.WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-100])


def not_safetensors(folder):
    torch.save({"a": torch.zeros(2)}, folder / adapter.WEIGHTS_NAME)


def edit_config(**changes):
    """Change the config and, so that only the content is at fault, its copy in the weights."""

    def edit(folder):
        path = folder / adapter.CONFIG_NAME
        described = json.loads(path.read_text())
        for name, value in changes.items():
            field, _, inner = name.partition("__")
            if inner:
                described[field][inner] = value
            else:
                described[field] = value
        text = json.dumps(described, indent=2)
        path.write_text(text)
        tensors = load_file(folder / adapter.WEIGHTS_NAME)
        save_file(tensors, folder / adapter.WEIGHTS_NAME, {"adapter": text})

    return edit


def edit_tensor(name, replacement):
    def edit(folder):
        path = folder / adapter.WEIGHTS_NAME
        tensors = load_file(path)
        tensors.pop(name, None)
        if replacement is not None:
            tensors[name] = replacement
        text = json.dumps(json.loads((folder / adapter.CONFIG_NAME).read_text()), indent=2)
        save_file(tensors, path, {"adapter": text})

    return edit


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (truncate, ValueError, ["adapter_model.safetensors", "truncated"]),
        (not_safetensors, ValueError, ["adapter_model.safetensors", "not a safetensors"]),
        (lambda f: (f / adapter.WEIGHTS_NAME).write_bytes(b""), ValueError, ["truncated"]),
        (lambda f: (f / adapter.WEIGHTS_NAME).unlink(), FileNotFoundError, ["adapter_model"]),
        (lambda f: (f / adapter.CONFIG_NAME).unlink(), FileNotFoundError, ["adapter_config"]),
        (lambda f: (f / adapter.CONFIG_NAME).write_text("{"), ValueError, ["not valid JSON"]),
        (lambda f: (f / adapter.CONFIG_NAME).write_text("[]"), ValueError, ["library"]),
        (lambda f: (f / adapter.CONFIG_NAME).write_bytes(b"\xff\xfe{"), ValueError, ["JSON"]),
        (edit_config(format=99), ValueError, ["format", "99"]),
        (edit_config(base_model=None), ValueError, ["base_model", "None"]),
        (edit_config(base_model__dim=64), ValueError, ["base_model.dim", "64", "32"]),
        (edit_config(base_model__num_layers=8), ValueError, ["base_model.num_layers", "8", "3"]),
        (edit_config(base_model__num_heads=2), ValueError, ["base_model.num_heads"]),
        (edit_config(base_model__kv_heads=2), ValueError, ["base_model.kv_heads"]),
        (edit_config(config__recent=-1), ValueError, ["config", "recent", "-1"]),
        (edit_config(config__gate="wide"), ValueError, ["config", "gate", "'wide'"]),
        (edit_config(config__novel=1), ValueError, ["config", "novel"]),
        (edit_config(config__memory_dim=16), ValueError, ["layers.0.memory", "shape"]),
        (edit_config(config__memory="none"), ValueError, ["layers.0", "not expected"]),
        (edit_config(config__layers=[0, 1, 2]), ValueError, ["layers.1", "missing"]),
        (edit_tensor("layers.0.gate.bias", None), ValueError, ["layers.0.gate.bias", "missing"]),
        (edit_tensor("other", torch.zeros(1)), ValueError, ["other", "not expected"]),
        (
            edit_tensor("layers.0.gate.bias", torch.zeros(4, dtype=torch.int8)),
            ValueError,
            ["layers.0.gate.bias", "int8"],
        ),
        (
            lambda f: save_file({}, f / adapter.WEIGHTS_NAME),
            ValueError,
            ["adapter_model.safetensors", "same adapter"],
        ),
    ],
)
def test_damaged_or_foreign_adapters_are_refused(saved, damage, error, words):
    folder, _ = saved
    damage(folder)
    model = tiny_lm()
    before = list(model.state_dict())
    with pytest.raises(error) as caught:
        ttt_cache.load_adapter(model, folder)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert list(model.state_dict()) == before
    ttt_cache.patch(model, **SMALL)  # nothing was left behind


def test_wrong_places(tmp_path, saved):
    folder, model = saved
    for nowhere in (tmp_path / "nowhere" / "deep" / "down", "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"nowhere.*does not exist"):
            ttt_cache.load_adapter(tiny_lm(), nowhere)
    with pytest.raises(RuntimeError, match="patched already"):
        ttt_cache.load_adapter(model, folder)
    with pytest.raises(RuntimeError, match="not patched"):
        ttt_cache.save_adapter(tiny_lm(), tmp_path)
    with pytest.raises(TypeError, match="base_model must be a string"):
        ttt_cache.save_adapter(model, tmp_path, base_model=tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config.json: config: recent .* context 5"):
        ttt_cache.load_adapter(tiny_lm(context=5), folder)
    abstract = tiny_lm(device="meta")
    ttt_cache.patch(abstract, **SMALL)
    with pytest.raises(RuntimeError, match="meta device"):
        ttt_cache.save_adapter(abstract, tmp_path)
    with pytest.raises(RuntimeError, match="meta device"):
        ttt_cache.load_adapter(tiny_lm(device="meta"), folder)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NotADirectoryError, match="file"):
        ttt_cache.save_adapter(model, file)
