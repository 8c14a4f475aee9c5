"""docs/finetune.md: two processes with half of the rows each train as one does, cache and all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_support import RUNS, all_rows, work
from models import assert_near, tiny_lm
from moshi.modules.lora import replace_all_linear_with_lora
from safetensors.torch import load_file

import ttt_cache

LOSS = {torch.float32: 1e-5, torch.bfloat16: 1e-3}  # relative difference allowed
# Loaded into a model of bfloat16, slow weights are rounded to it: some units in its last place.
LOGITS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of their scale


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Results of one process, where moshi-finetune does not use FSDP."""
    folder = tmp_path_factory.mktemp("alone")
    # Not in this process: other tests choose other blocks, which bfloat16 rounds otherwise.
    torch.multiprocessing.spawn(work, (1, folder), nprocs=1)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Results of two processes under FSDP."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.multiprocessing.spawn(work, (2, folder), nprocs=2)
    return folder


@pytest.fixture(params=RUNS, ids=lambda run: run.name)
def run(request):
    return request.param


@pytest.fixture(params=["alone", "sharded"])
def results(request, run):
    return request.getfixturevalue(request.param) / run.name


def facts_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "facts.json").read_text())


def adapter_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_two_processes_train_as_one(alone, sharded, run):
    one, two = (facts_in(folder / run.name)["losses"] for folder in (alone, sharded))
    assert two == pytest.approx(one, rel=LOSS[run.dtype])
    assert one[0] != pytest.approx(one[-1], rel=1e-3)


def test_the_adapter_is_trained_in_float32(results):
    start, end = adapter_in(results / "start"), adapter_in(results / "end")
    assert start.keys() == end.keys()
    assert {tensor.dtype for tensor in end.values()} == {torch.float32}
    assert not [name for name in end if torch.equal(start[name], end[name])]


def test_the_base_has_its_own_dtype_and_only_what_should_be_trained_is(results, run):
    base = tiny_lm().to(run.dtype).state_dict()
    states = load_file(results / "base.safetensors")
    trained = {n for n in states if n.endswith(("lora_A.weight", "lora_B.weight"))}
    frozen = states.keys() - trained
    assert bool(trained) == run.lora
    moved = {n for n in frozen if not torch.equal(states[n], base[n.replace(".frozen_W.", ".")])}
    assert not moved if run.lora else moved
    dtypes = facts_in(results)["dtypes"]
    assert {t for n, t in dtypes.items() if ".ttt_cache." not in n} == {str(run.dtype)}
    assert {t for n, t in dtypes.items() if ".ttt_cache." in n} == {"torch.float32"}


def test_every_cache_is_a_unit_of_its_own(sharded, run):
    units = facts_in(sharded / run.name)["units"]
    assert units.count(["HierarchicalCache", "torch.float32"]) == 2
    assert {dtype for kind, dtype in units if kind != "HierarchicalCache"} == {str(run.dtype)}
    assert not {kind for kind, _ in units} & {"TTT", "FastWeights", "VirtualTokens", "Gate"}


def test_the_checkpoint_gives_the_trained_model(results, run):
    model = tiny_lm().to(run.dtype)
    if run.lora:
        replace_all_linear_with_lora(model, 2, 2.0)
    model.load_state_dict(load_file(results / "base.safetensors"))  # strict: no adapter in it
    ttt_cache.load_adapter(model, results / "end")
    with torch.no_grad():
        logits = model(codes=all_rows(0)).text_logits
    expected = load_file(results / "logits.safetensors")["logits"]
    finite = expected.isfinite()
    assert_near(logits[: len(expected)][finite], expected[finite], LOGITS[run.dtype])


def test_a_run_goes_on_from_an_adapter(results, run):
    end, again = adapter_in(results / "end"), adapter_in(results / "again")
    kept = {n: t if ".fast." in n else t.to(run.dtype).float() for n, t in end.items()}
    assert kept.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in kept.items())
