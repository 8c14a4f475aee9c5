"""`ttt-cache evaluate` on another Moshi and recordings, from its files to those that it writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from data_support import FRAME, write_data_set
from evaluation_support import CONTEXT, recipe
from models import TINY, tiny_lm
from torch.nn import functional as F
from training_support import use_tiny_mimi, write_checkpoint
from typer.testing import CliRunner

from ttt_cache.cli import main
from ttt_cache.evaluation import arms, protocol
from ttt_cache.evaluation.experiments import EXPERIMENTS, controls
from ttt_cache.evaluation.measures import Cost
from ttt_cache.training.data import TokenCache

NAMES = "full", "window", "hybrid", "hierarchical"
LENGTHS = 140, 70, 130, 80  # frames: of these the first and the third are measured on
ROWS, FRAMES = 2, 2 * CONTEXT
assert TINY["context"] == CONTEXT


@pytest.fixture(autouse=True)
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some arms only, adapters of one step, and a Mimi that need not be fetched."""
    use_tiny_mimi(monkeypatch)
    monkeypatch.setattr(protocol, "DEFAULT", recipe(1, 1))
    monkeypatch.setattr(arms, "HYBRID", recipe(0, 1, moshi=1.0))
    monkeypatch.setattr(controls, "Cost", partial(Cost, frames=10))
    experiment = type(EXPERIMENTS["controls"])
    every = experiment.points
    monkeypatch.setattr(
        experiment, "points", lambda self, plan: [p for p in every(self, plan) if p.name in NAMES]
    )


def evaluate(folder: Path, out: Path, *more: object) -> str:
    """The command for the checkpoint and the recordings in `folder`; what it printed."""
    model = folder / "model"
    files = {
        "moshi-weight": model / "model.safetensors",
        "mimi-weight": model / "mimi.safetensors",
        "tokenizer": model / "tokenizer.model",
        "config-path": model / "config.json",
        "data": folder / "data" / "data.jsonl",
    }
    given = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    given += ["--rows", ROWS, "--frames", FRAMES, "--recent", 6, "--chunk", 4, "--virtual", 3]
    given += ["--device", "cpu", "--threads", 1, "--out", out, *more]
    result = CliRunner().invoke(main, ["evaluate", *map(str, given)])
    assert result.exit_code == 0, result.output
    return result.output


def nats_of_text(lm: torch.nn.Module, cache: TokenCache, recordings: Sequence[int]) -> float:
    """Of the first context of some recordings, by Moshi's own forward pass."""
    rows = [next(iter(cache.codes([number])))[:, :CONTEXT].long() for number in recordings]
    codes = torch.stack(rows)
    with torch.no_grad():
        logits = lm(codes).text_logits[:, 0].float()
    return F.cross_entropy(logits.flatten(0, 1), codes[:, 0].flatten()).item()


def test_another_moshi_is_measured_on_recordings(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model")
    write_data_set(tmp_path / "data", [FRAME * frames for frames in LENGTHS])
    out = tmp_path / "out"
    assert "Kept: window." in evaluate(tmp_path, out, "--only", "window")
    assert not (out / "controls" / "controls.json").exists() and not any(out.glob("adapters/*"))
    printed = evaluate(tmp_path, out)
    record = json.loads((out / "controls" / "controls.json").read_text())
    assert list(record["points"]) == list(NAMES) and record["targets"] == []
    assert record["source"].startswith("data.jsonl ")
    assert record["model"]["name"].endswith("model.safetensors")
    assert (out / "controls" / "controls.png").read_bytes().startswith(b"\x89PNG")
    assert "Cross-entropy" in printed and "Recall" not in printed  # nobody marked what to recall
    for point in record["points"].values():
        assert point["recall"] == {} and point["cost"]["state_bytes"] > 0
        assert point["nats"].keys() == {"1x"}

    (tokens,) = (out / "tokens").iterdir()
    cache, lm = TokenCache.open(tokens), tiny_lm().bfloat16()
    assert cache.frames == list(LENGTHS)
    text = record["points"]["full"]["nats"]["1x"]["text"][0]
    assert text == pytest.approx(nats_of_text(lm, cache, [0, 2]), abs=5e-3)
    assert text != pytest.approx(nats_of_text(lm, cache, [1, 3]), abs=5e-3)

    made = [json.loads(path.read_text())["made"] for path in out.glob("adapters/*/training.json")]
    assert {adapter["source"] for adapter in made} == {record["source"]} and len(made) == 2
    assert {adapter["base"] for adapter in made} == {record["model"]["base"]}
    kept = {path: path.stat().st_mtime_ns for path in out.glob("results/*.json")}
    evaluate(tmp_path, out)
    assert kept == {path: path.stat().st_mtime_ns for path in out.glob("results/*.json")}
