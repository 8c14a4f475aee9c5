"""A run of every stage: what it trains, what it says, and what its settings do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from data_support import write_data_set
from models import random_codes
from training_support import (
    FULL,
    LORA,
    base,
    figures,
    make,
    small_and_alone,  # noqa: F401
    write_run,
)

import ttt_cache
from ttt_cache.training.carry import Carry
from ttt_cache.training.evaluate import evaluate
from ttt_cache.training.loss import predict
from ttt_cache.training.model import choose_trained

PATCHED = ("transformer.layers.0.", "transformer.layers.2.")


HELD_OUT = {"train_data": "data", "eval_data": "held_out"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    write_run(folder)
    write_data_set(folder / "held_out", [30_000])
    return folder


STAGES = {
    "distill": ({}, lambda name: ".ttt_cache." in name),
    "compressor": (LORA, lambda name: ".ttt_cache." in name),
    "layers": (FULL, lambda name: ".ttt_cache." in name or name.startswith(PATCHED)),
    "everything": (FULL, lambda name: True),
    "layers lora": (
        LORA,
        lambda n: ".ttt_cache." in n or (n.startswith(PATCHED) and ".lora_" in n),
    ),
    "everything lora": (LORA, lambda name: ".ttt_cache." in name or ".lora_" in name),
    "everything embeddings": (
        {"lora": LORA["lora"] | {"ft_embed": True}},
        lambda n: ".ttt_cache." in n or ".lora_" in n or n.split(".")[0].endswith("emb"),
    ),
}


@pytest.mark.parametrize("case", STAGES)
def test_a_stage_trains_exactly_what_it_should(folder, case):
    changes, belongs = STAGES[case]
    name = f"stage {case}"
    run = make(folder, name, {"train": case.split()[0]}, **changes)
    before = {n: p.detach().clone() for n, p in run.lm.named_parameters()}
    run.train()
    after = dict(run.lm.named_parameters())
    assert {n for n, p in after.items() if p.requires_grad} == set(filter(belongs, before))
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed and all(map(belongs, changed))
    # Weight decay moves all but zeros: nothing that should be trained was left out.
    still = {n for n in filter(belongs, before) if n not in changed}
    assert all(not before[n].any() for n in still), still


def test_an_adapter_has_the_loss_of_its_run(folder):
    data = {n: str(folder / d / "data.jsonl") for n, d in HELD_OUT.items()}
    run = make(folder, "evaluated", data=data, do_eval=True, eval_freq=2)
    run.train()
    lm = base(folder).get_moshi(dtype=torch.float32)
    handle = ttt_cache.load_adapter(lm, folder / "evaluated" / "adapter")
    assert run.eval_data is not None
    losses = evaluate(run.accelerator, lm, handle, run.eval_data, 16, run.weights)
    said = figures(folder, "evaluated")[-1]
    # Torch folds the products of weights that do not require gradients in another way.
    assert {name: said[f"eval/{name}"] for name in losses} == pytest.approx(losses, rel=1e-6)
    assert run.before["loss"] != losses["loss"]
    page = (folder / "evaluated" / "summary.md").read_text()
    assert f"| this run | {losses['loss']:.4f} |" in page
    longer = evaluate(run.accelerator, lm, handle, run.eval_data, 5, run.weights)
    assert longer == pytest.approx(losses, rel=1e-5)  # the length of segments is no matter


def test_without_do_eval_only_start_and_end_are_evaluated(folder):
    data = {n: str(folder / d / "data.jsonl") for n, d in HELD_OUT.items()}
    make(folder, "ends only", data=data, eval_freq=1).train()
    assert not any(name.startswith("eval/") for r in figures(folder, "ends only") for name in r)
    page = (folder / "ends only" / "summary.md").read_text()
    assert "| before training |" in page and "| this run |" in page


def test_without_held_out_recordings_the_page_says_what_was_seen(folder):
    make(folder, "unheard").train()
    page = (folder / "unheard" / "summary.md").read_text()
    assert "there is no eval_data" in page and "Of attention, " in page
    assert "| layer | gate open |" in page and "Mean losses" not in page


def test_the_divergence_from_full_context_is_none_of_full_context(folder):
    cache = {"distillation_weight": 1.0, "patch": {"preset": "full-context"}}
    make(folder, "same", {"train": "layers", "frames": [40]}, cache=cache, **LORA).train()
    assert all(abs(record["kl"]) < 1e-6 for record in figures(folder, "same"))


def test_segments_follow_the_curriculum(folder):
    stage = {"train": "compressor", "steps": 3, "frames": [8, 16, 32]}
    make(folder, "curriculum", stage).train()
    assert [record["frames"] for record in figures(folder, "curriculum")] == [8, 16, 32]


def test_gradient_checkpointing_changes_no_loss(folder):
    for name, on in (("kept", False), ("recomputed", True)):
        stage = {"train": "layers", "steps": 3}
        make(folder, name, stage, gradient_checkpointing=on, **LORA).train()
    for name in ("loss", "grad_norm"):
        kept, again = ([r[name] for r in figures(folder, n)] for n in ("kept", "recomputed"))
        assert again == pytest.approx(kept, rel=1e-6)


def test_bfloat16_with_float32_masters(folder):
    run = make(folder, "narrow", {"train": "layers"}, param_dtype="bfloat16", **LORA)
    run.train()
    for name, parameter in run.lm.named_parameters():
        fast = name.endswith(("initial", "anchor"))  # float32 by themselves
        narrow = not parameter.requires_grad and not fast
        assert parameter.dtype == (torch.bfloat16 if narrow else torch.float32), name
    AcceleratorState._reset_state(reset_partial_state=True)
    make(folder, "wide", {"train": "layers"}, **LORA).train()
    losses = [[r["loss"] for r in figures(folder, name)] for name in ("narrow", "wide")]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def test_distillation_in_bfloat16_learns(folder):
    stage = {"train": "distill", "steps": 20, "lr": 1e-2}
    make(folder, "distil", stage, param_dtype="bfloat16").train()
    errors = [record["error/0"] for record in figures(folder, "distil")]
    assert sum(errors[-5:]) < sum(errors[:5]) < 5


def test_looks_at_the_gates_are_logged_whatever_log_freq(folder):
    make(folder, "seldom", log_freq=2).train()
    assert [("gate/0" in r, r["step"]) for r in figures(folder, "seldom")] == [(True, 1), (True, 2)]


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharding_by_accelerate_is_refused(folder, monkeypatch, kind):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")  # as `accelerate launch` sets it
    with pytest.raises(ValueError, match=f"accelerate is set to {kind}, which is not supported"):
        make(folder, "sharded")
    assert not (folder / "sharded").exists()


@pytest.mark.parametrize("stage", ["distill", "compressor", "layers", "everything"])
def test_segments_in_which_nothing_leaves_the_window_are_refused(folder, stage):
    with pytest.raises(ValueError, match=r"stages\.0\.frames: .* within 9 frames"):
        make(folder, f"short {stage}", {"train": stage, "frames": [4, 9]}, **FULL)
    make(folder, f"enough {stage}", {"train": stage, "frames": [4, 10]}, **FULL)


def test_only_what_leaves_the_window_within_a_segment_trains_the_write(folder):
    """Whichever phase of a chunk a segment begins in."""
    run = make(folder, "phases")
    facts, codes = run.facts, random_codes(run.lm, 60)
    for length, learns in ((6, False), (10, True)):
        for phase in range(4):
            carry, begin = Carry(run.handle), 0
            for segment in (6 + phase, length):
                run.lm.zero_grad()
                choose_trained(run.lm, run.handle, run.settings, "compressor")
                part = facts.delayed(codes[0])[None, :, begin : begin + segment + 1]
                with carry.segment(torch.tensor([begin == 0])):
                    predict(run.lm, part).text.float().logsumexp(-1).sum().backward()
                begin += segment
            write = run.handle.caches[0].memory.project.grad
            assert (write is not None and bool(write.any())) == learns, (length, phase)


def test_segments_longer_than_every_session_are_refused(folder):
    stage = {"train": "compressor", "frames": [16, 10**13]}
    with pytest.raises(ValueError, match=r"stages\.0\.frames: .* beyond 68, the longest session"):
        make(folder, "padding", stage)
    with pytest.raises(ValueError, match=r"duration_sec: .* beyond 68"):
        make(folder, "padding too", duration_sec=10)


def test_an_adapter_that_is_not_there_is_named_before_the_model_loads(folder, monkeypatch):
    monkeypatch.setattr("ttt_cache.training.pretrained.OfRun.language_model", None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", _offline)
    with pytest.raises(ValueError, match=r"ttt_cache\.adapter: folder no/where is neither"):
        make(folder, "no adapter", cache={"adapter": "no/where", "patch": {}})


def _offline(*_):
    raise OSError("offline")
