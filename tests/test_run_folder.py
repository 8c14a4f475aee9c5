"""Whose a run's folder is, what may go on in it, and what overwriting removes."""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from models import tiny_lm
from run_support import contents, given, half_of, losses, refused, trained
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_support import FILES, settings_of, write_checkpoint

from ttt_cache.training import engine
from ttt_cache.training.engine import train
from ttt_cache.training.processes import accelerator_for

pytestmark = pytest.mark.usefixtures("tiny_mimi")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"optim": {"lr": 0.02}}, "optim.lr is 0.02"),
        ({"seed": 1}, "seed is 1"),
        ({"batch_size": 3}, "rows is 3"),
        ({"max_steps": 9}, "max_steps is 9"),
    ],
)
def test_another_runs_folder_is_left_alone(folder, done, changes, key):
    before = contents(done)
    refused(folder, "done", key, str(done), "overwrite_run_dir", **changes)
    assert contents(done) == before


@pytest.mark.parametrize("settings", [None, '{"editor.tabSize": 4}', "[]", '{"rows": 1, '])
def test_a_folder_of_something_else_is_left_alone(folder, request, settings):
    other = folder / request.node.name
    (other / "adapter").mkdir(parents=True)
    (other / "adapter" / "thesis.txt").write_text("years of work")
    if settings is not None:
        (other / "settings.json").write_text(settings)
    before = contents(other)
    for overwrite in (False, True):
        words = [str(other), "must be empty or hold a run", "settings.json"]
        refused(folder, other.name, *words, overwrite_run_dir=overwrite)
    assert contents(other) == before


def test_a_folder_with_nothing_that_a_run_removes_may_be_used(folder):
    """`ttt-cache distill` puts the codes of `ttt-cache train` there, a job its log."""
    run_dir = folder / "prepared"
    (run_dir / "codes").mkdir(parents=True)
    (run_dir / "slurm-1.out").write_text("Loading")
    train(settings_of(folder, run_dir.name, **given(folder)))
    assert len(losses(run_dir)) == 3 and (run_dir / "slurm-1.out").read_text() == "Loading"


def test_overwriting_removes_what_a_run_wrote_and_nothing_else(folder, done, half):
    (half / "notes.txt").write_text("mine")
    codes = shutil.copytree(folder / "codes", half / "codes")
    before = contents(codes)
    changes = {"max_steps": 1, "overwrite_run_dir": True, "ckpt_freq": 0}
    train(settings_of(folder, half.name, **(given(folder, codes_dir=str(codes)) | changes)))
    assert [record["step"] for record in losses(half)] == [1]
    assert [path.name for path in (half / "checkpoints").iterdir()] == ["step_000001"]
    assert len(list((half / "tensorboard").iterdir())) == 1
    assert contents(codes) == before and (half / "notes.txt").read_text() == "mine"


def test_a_run_that_is_refused_overwrites_nothing(folder, half):
    damaged = folder / "damaged.safetensors"
    damaged.write_bytes((folder / "model" / "model.safetensors").read_bytes()[:-8])
    before = contents(half)
    paths = write_checkpoint(folder / "model") | {"moshi_path": str(damaged)}
    refused(folder, half.name, str(damaged), moshi_paths=paths, overwrite_run_dir=True)
    adapter = given(folder, adapter=str(half / "adapter"), patch={})
    refused(folder, half.name, "overwrite_run_dir", "adapter", **adapter, overwrite_run_dir=True)
    assert contents(half) == before


def test_two_runs_in_one_folder(folder, half):
    with (half / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for overwrite in (False, True):
            before = contents(half)
            words = [str(half), "another process is writing this run"]
            refused(folder, half.name, *words, overwrite_run_dir=overwrite)
            assert contents(half) == before
    train(settings_of(folder, half.name, **given(folder)))


def test_what_changes_no_step_may_change(folder, done, half):
    """The folder moved, the codes elsewhere, other figures shown and kept."""
    codes = folder / "other codes"
    changes = {"ckpt_freq": 0, "log_freq": 2, "save_adapters": False, "num_ckpt_keep": 1}
    changes |= {"wandb": {"offline": True}}
    train(settings_of(folder, half.name, **(given(folder, codes_dir=str(codes)) | changes)))
    assert losses(half) == losses(done)
    name = "adapter/adapter_model.safetensors"
    assert (half / name).read_bytes() == (done / name).read_bytes()
    assert codes.exists()


def test_a_run_goes_on_with_the_model_that_it_began_with(folder, done):
    paths = write_checkpoint(folder / "replaced")
    weights = Path(paths["moshi_path"])
    trained(folder, "replaced run", moshi_paths=paths)
    shutil.rmtree(folder / "replaced run" / "checkpoints" / "step_000003")
    before = contents(folder / "replaced run")
    kept = weights.read_bytes()
    torch.manual_seed(1)
    other = {k: torch.randn_like(v) for k, v in tiny_lm().state_dict().items()}
    save_file(other, weights)
    assert weights.stat().st_size == len(kept)
    refused(folder, "replaced run", "moshi_paths", str(weights), "began with", moshi_paths=paths)
    assert contents(folder / "replaced run") == before
    weights.write_bytes(kept)
    trained(folder, "replaced run", moshi_paths=paths)
    assert losses(folder / "replaced run") == losses(done)


def test_a_run_goes_on_with_the_config_that_it_began_with(folder, half):
    paths = write_checkpoint(folder / "model")
    config = json.loads(Path(paths["config_path"]).read_text())
    other = folder / "other config.json"
    other.write_text(json.dumps(config | {"max_period": 500}))
    paths["config_path"] = str(other)
    words = ["moshi_paths.config_path", str(other), "is not what the run"]
    refused(folder, half.name, *words, moshi_paths=paths)


def test_a_run_goes_on_with_the_adapter_that_it_began_with(folder, done):
    """Its config has the settings of the patch."""
    adapter = shutil.copytree(done / "adapter", folder / "given adapter")
    changes = given(folder, adapter=str(adapter), patch={})
    run_dir = half_of(trained(folder, "adapted", **changes), "half adapted")
    config = adapter / "adapter_config.json"
    for path in (config, adapter / "adapter_model.safetensors"):
        before = path.read_bytes()
        if path == config:
            path.write_bytes(before + b"\n")
        else:
            with safe_open(path, "pt") as file:
                described = file.metadata()
            tensors = {name: tensor + 1 for name, tensor in load_file(path).items()}
            save_file(tensors, path, described)
        words = ["ttt_cache.adapter", str(path), "began with"]
        refused(folder, run_dir.name, *words, **changes)
        path.write_bytes(before)
    moved = adapter.rename(folder / "moved adapter")
    train(settings_of(folder, run_dir.name, **given(folder, adapter=str(moved), patch={})))
    assert losses(run_dir) == losses(folder / "adapted")


def test_what_a_run_began_with_may_not_be_left_out(folder):
    name = "held out"
    data = {"train_data": str(folder / "data" / "data.jsonl")}
    evaluated = {"data": data | {"eval_data": data["train_data"]}}
    shutil.rmtree(trained(folder, name, **evaluated) / "checkpoints" / "step_000003")
    refused(folder, name, "data.eval_data: not given", "began with one", data=data)


def test_data_and_model_may_move(folder, done, half):
    data = shutil.copytree(folder / "data", folder / "moved" / "data")
    model = shutil.copytree(folder / "model", folder / "moved" / "model")
    paths = {name: str(model / file) for name, file in FILES.items()}
    changes = given(folder) | {"moshi_paths": {"hf_repo_id": "local/only"} | paths}
    changes["data"] = {"train_data": str(data / "data.jsonl")}
    train(settings_of(folder, half.name, **changes))
    assert losses(half) == losses(done)


def test_a_run_goes_on_though_there_are_new_keys(folder, done, half):
    path = half / "settings.json"
    began = json.loads(path.read_text())
    del began["full_finetuning"], began["ttt_cache"]["session_sec"]
    del began["ttt_cache"]["stages"][0]["lr"]
    path.write_text(json.dumps(began))
    refused(folder, half.name, "full_finetuning is True", full_finetuning=True)
    train(settings_of(folder, half.name, **given(folder)))
    assert losses(half) == losses(done)


def test_a_result_is_not_erased_unasked(folder, done):
    """Whatever became of the figures and checkpoints of the run that it is of."""
    run_dir = shutil.copytree(done, folder / "result")
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "metrics.jsonl").unlink()
    before = contents(run_dir)
    refused(folder, run_dir.name, "seed is 1", "overwrite_run_dir", seed=1)
    refused(folder, run_dir.name, "no checkpoint", "overwrite_run_dir")
    assert contents(run_dir) == before


def test_a_run_goes_on_with_the_recordings_that_it_began_with(folder, half):
    data = shutil.copytree(folder / "data", folder / "fewer")
    manifest = folder / "data" / "data.jsonl"
    kept = manifest.read_text()
    try:
        manifest.write_text("".join(kept.splitlines(keepends=True)[:-1]))
        changes = given(folder, codes_dir=str(folder / "fewer codes"))
        refused(folder, half.name, "data.train_data", str(manifest), "began with", **changes)
    finally:
        manifest.write_text(kept)
        shutil.rmtree(data)


def test_without_checkpoints_a_run_is_not_begun_again_unasked(folder):
    changes = given(folder) | {"do_ckpt": False, "max_steps": 1}
    run_dir = train(settings_of(folder, "unkept", **changes))
    before = contents(run_dir)
    refused(folder, "unkept", str(run_dir), "no checkpoint", "overwrite_run_dir", **changes)
    assert contents(run_dir) == before
    train(settings_of(folder, "unkept", **changes, overwrite_run_dir=True))
    assert len(losses(run_dir)) == 1


def test_a_missing_package_is_told_before_anything_long(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(engine, "load", lambda *_: pytest.fail("the model was loaded"))
    refused(folder, "untold", "pip install wandb", wandb={"project": "p"})
    assert not (folder / "untold").exists()


def test_processes_wait_while_one_tokenises(folder):
    accelerator = accelerator_for(settings_of(folder, "patient"))
    assert accelerator.init_handler.timeout == timedelta(days=1)


@pytest.mark.parametrize(
    "place", [{"stage": 7}, {"stage_step": 9}, {"step": 3}, {"stage": "0"}, {"stage_step": -1}]
)
def test_a_place_that_the_run_does_not_have(folder, half, place):
    path = half / "checkpoints" / "step_000002" / "position.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | place))
    refused(folder, half.name, str(path), "is no place in this run")


@pytest.mark.parametrize("held", [{}, {"state": {}, "param_groups": []}, {"state": {"a": {}}}])
def test_another_optimizers_state_is_named(folder, half, held):
    path = half / "checkpoints" / "step_000002" / "optimizer.pt"
    torch.save(held, path)
    refused(folder, half.name, str(path), "remove this checkpoint")


def test_other_states_are_named(folder, half):
    path = half / "checkpoints" / "step_000002" / "carry-0.safetensors"
    save_file({f"other.{name}": state for name, state in load_file(path).items()}, path)
    refused(folder, half.name, str(path), "remove this checkpoint")
