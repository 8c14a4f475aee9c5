"""The YAML of a run: what is refused names the file and the key, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ttt_cache.training.config_file import read_settings

FILES = {"data": {"train_data": "data.jsonl"}, "run_dir": "run"}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a YAML beside an (empty) manifest, and returns its path."""
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").touch()

    def write(**changes: Any) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(FILES | changes))
        return path

    return write


def refusal(path: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read_settings(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batchsize": 2}, ["batchsize: unknown key", "batch_size"]),
        ({"optim": {"learning_rate": 1}}, ["optim.learning_rate: unknown key", "weight_decay"]),
        ({"lora": {"r": 1}}, ["lora.r: unknown key", "rank"]),
        ({"wandb": {"entity": "x"}}, ["wandb.entity: unknown key", "project"]),
        ({"ttt_cache": {"layers": [1]}}, ["ttt_cache.layers: unknown key", "patch"]),
        ({"ttt_cache": {"patch": {"recnt": 5}}}, ["ttt_cache.patch", "recnt"]),
        (
            {"ttt_cache": {"stages": [{"train": "compressor", "step": 5}]}},
            ["ttt_cache.stages.0.step: unknown key", "steps"],
        ),
    ],
)
def test_an_unknown_key_is_named_with_those_there_are(write, changes, words):
    path = write(**changes)
    said = refusal(path)
    assert all(word in said for word in [str(path), *words]), said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 0}, ["batch_size", "got 0"]),
        ({"batch_size": True}, ["batch_size", "got True"]),
        ({"batch_size": 1.5}, ["batch_size", "got 1.5"]),
        ({"max_steps": "many"}, ["max_steps", "'many'"]),
        ({"optim": {"lr": -1}}, ["optim.lr", "got -1"]),
        ({"optim": {"lr": True}}, ["optim.lr", "got True"]),
        ({"optim": {"lr": float("nan")}}, ["optim.lr", "got nan"]),
        ({"optim": {"pct_start": 2}}, ["optim.pct_start", "got 2"]),
        ({"optim": 3}, ["optim", "got 3"]),
        ({"duration_sec": float("inf")}, ["duration_sec", "got inf"]),
        ({"param_dtype": "float16"}, ["param_dtype", "'float16'"]),
        ({"run_dir": ""}, ["run_dir"]),
        ({"seed": 10**23}, ["seed", str(10**23)]),
        ({"data": {}}, ["data.train_data: must be given"]),
        ({"data": {"train_data": ""}}, ["data.train_data"]),
        ({"ttt_cache": {"stages": []}}, ["ttt_cache.stages"]),
        ({"ttt_cache": {"stages": [{"train": "adapter"}]}}, ["stages.0.train", "'adapter'"]),
        ({"ttt_cache": {"patch": {"recent": "x"}}}, ["ttt_cache.patch", "recent"]),
    ],
)
def test_a_value_that_is_not_allowed_is_named(write, changes, words):
    path = write(**changes)
    said = refusal(path)
    assert all(word in said for word in [str(path), *words]), said


@pytest.mark.parametrize("frames", [[], [0], [8, -1], [True], [1.5], "8"])
def test_lengths_of_segments_are_whole_and_positive(write, frames):
    path = write(ttt_cache={"stages": [{"train": "compressor", "frames": frames}]})
    assert f"{path}: ttt_cache.stages.0.frames" in refusal(path)


STAGE = {"train": "compressor"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora": {"enable": True}, "full_finetuning": True}, ["full_finetuning", "lora.enable"]),
        ({"ttt_cache": {"stages": [{"train": "layers"}]}}, ["layers", "lora.enable"]),
        (
            {
                "full_finetuning": True,
                "ttt_cache": {"stages": [{"train": "layers"}, {"train": "compressor"}]},
            },
            ["ttt_cache.stages", "distill, compressor, layers, everything"],
        ),
        ({"do_eval": True}, ["data.eval_data", "do_eval"]),
        (
            {"ttt_cache": {"adapter": "a/b", "patch": {"recent": 5}}},
            ["ttt_cache.adapter", "ttt_cache.patch"],
        ),
        (
            {"max_steps": 2, "ttt_cache": {"stages": [STAGE | {"frames": [32, 64, 128]}]}},
            ["ttt_cache.stages.0.frames", "3 lengths", "got 2"],
        ),
    ],
)
def test_keys_that_contradict_each_other(write, changes, words):
    path = write(**changes)
    said = refusal(path)
    assert all(word in said for word in [str(path), *words]), said


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"data": {"train_data": "none.jsonl"}}, "data.train_data"),
        ({"data": {"train_data": "data.jsonl", "eval_data": "none.jsonl"}}, "data.eval_data"),
        ({"moshi_paths": {"moshi_path": "none.safetensors"}}, "moshi_paths.moshi_path"),
        ({"moshi_paths": {"config_path": "none.json"}}, "moshi_paths.config_path"),
        ({"moshi_paths": {"lora_path": "none.safetensors"}}, "moshi_paths.lora_path"),
        ({"data": {"train_data": "hf://a/b/none.jsonl"}}, "data.train_data"),
        ({"moshi_paths": {"config_path": "hf://a/b/none.json"}}, "moshi_paths.config_path"),
        ({"ttt_cache": {"adapter": "runs/none./adapter"}}, "ttt_cache.adapter"),
    ],
)
def test_a_missing_file_is_named_with_its_key(write, changes, key):
    path = write(**changes)
    said = refusal(path)
    assert said.startswith(f"{path}: {key}: ") and "none." in said and "does not exist" in said


def test_files_of_the_hub_are_not_looked_for(write):
    paths = {"moshi_path": "hf://a/b/c.safetensors", "mimi_path": "hf://a/b/d.safetensors"}
    settings = read_settings(write(moshi_paths=paths, ttt_cache={"adapter": "owner/name"}))
    assert settings.moshi_paths.moshi_path == paths["moshi_path"]


@pytest.mark.parametrize("text", ["seed: 1\nseed: 1\n", "optim:\n  lr: 1.0\n  lr: 2.0\n"])
def test_a_key_that_is_given_twice(write, text):
    path = write()
    path.write_text(path.read_text() + text)
    key = text.split(":")[-2].split()[-1]
    assert f"the key {key} is given twice" in refusal(path) and str(path) in refusal(path)


@pytest.mark.parametrize("text", ["", "- a list\n", "a: [1\n", "a: 1\na: b: c\n"])
def test_what_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert str(path) in refusal(path)


def test_a_missing_yaml_is_named(tmp_path):
    assert str(tmp_path / "none.yaml") in refusal(tmp_path / "none.yaml")


def test_all_that_is_wrong_is_said_at_once(write):
    said = refusal(write(batch_size=0, max_stepz=3)).splitlines()
    assert len(said) == 2 and "batch_size" in said[0] and "max_stepz" in said[1]


def test_numbers_as_people_write_them(write):
    """YAML 1.1 takes 1e-4, without a point, for a string."""
    path = write()
    path.write_text(path.read_text() + "optim:\n  lr: 1e-4\nmax_norm: .inf\n")
    settings = read_settings(path)
    assert settings.optim.lr == 1e-4 and settings.max_norm == float("inf")


def test_a_curriculum_shares_the_steps(write):
    stage = {"train": "compressor", "steps": 6, "frames": [8, 16, 32]}
    settings = read_settings(write(ttt_cache={"stages": [stage, {"train": "compressor"}]}))
    lengths, plain = settings.ttt_cache.stages
    assert [settings.frames_of(lengths, step) for step in range(6)] == [8, 8, 16, 16, 32, 32]
    assert settings.frames_of(plain, 0) == 125  # 10 s
    assert settings.steps_of(plain) == 100
