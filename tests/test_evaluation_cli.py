"""`ttt-cache evaluate`: what it shows, refuses and keeps."""

from __future__ import annotations

import inspect
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from evaluation_support import CONTEXT, recipe, tiny
from moshi.models.lm import LMModel
from typer.testing import CliRunner, Result

from ttt_cache import testbed
from ttt_cache.cli import main
from ttt_cache.cli.evaluate import evaluate
from ttt_cache.evaluation import arms, model, protocol
from ttt_cache.evaluation.experiments import EXPERIMENTS
from ttt_cache.testbed import files
from ttt_cache.testbed.model import CONFIG

SIZES = {"dim": 16, "num_heads": 2, "context": CONTEXT}
SIZES |= {"depformer_dim": 8, "depformer_dim_feedforward": 16, "depformer_num_heads": 1}


@pytest.fixture(autouse=True)
def small_testbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A testbed of a few kilobytes without shipped adapters, and recipes of one step."""
    with monkeypatch.context() as written:
        written.setattr(files, "CONFIG", CONFIG | SIZES)
        files.write(tiny(), tmp_path / "testbed", {"seed": 0})
    monkeypatch.setattr(testbed, "checkpoint", lambda: files.checkpoint(tmp_path / "testbed"))
    monkeypatch.setattr(testbed, "FOLDER", tmp_path / "testbed")
    settings = {"recent": 6, "chunk": 4, "virtual": 3, "memory_heads": 2, "memory_dim": 4}
    monkeypatch.setattr(model, "TESTBED_SETTINGS", {**settings, "hidden_dim": 8})
    monkeypatch.setattr(protocol, "DEFAULT", recipe(0, 1))
    monkeypatch.setattr(arms, "HYBRID", recipe(0, 1, moshi=1.0))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


def plain(result: Result) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", result.output)


def said(result: Result) -> str:
    return re.sub(r"\s+", " ", plain(result))


def test_help_teaches_every_experiment():
    shown = said(call("--help"))
    for name in EXPERIMENTS:
        assert name in shown
    assert "Give the same command again to go on after an interruption" in shown
    assert "--hf-repo kyutai/moshiko-pytorch-bf16 --data my.jsonl" in shown


def test_help_tells_how_much_is_measured():
    shown = said(call("--help"))
    rows = sorted({experiment.rows for experiment in EXPERIMENTS.values()})
    assert f"[default: (the experiment's: {rows[0]} or {rows[1]})]" in shown and len(rows) == 2
    lengths = {name: each.frames(SimpleNamespace(context=1)) for name, each in EXPERIMENTS.items()}
    pairs, unbounded = lengths.pop("pairs"), lengths.pop("unbounded")
    (times,) = set(lengths.values())
    told = f"{times} contexts; pairs {pairs:,}; unbounded {unbounded:,} or more"
    assert f"[default: (the experiment's: {told})]" in shown


def test_help_keeps_its_lines_in_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = [line.strip() for line in plain(call("--help")).splitlines()]
    _, *others = inspect.getdoc(evaluate).split("\n\n")
    assert all(line.strip() in lines for paragraph in others for line in paragraph.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["everything"], "EXPERIMENT must be one of"),
        (["--rows", 0], "--rows must be"),
        (["--frames", 12], "--frames must be"),
        (["--level", "easy"], "--level must be one of few, many"),
        (["--data", "x.jsonl"], "--data needs a model to hear it"),
        (["--seed", -1], "--seed must be at least 0"),
        (["--seed", 10**23], f"--seed must be at most 4294967295, got {10**23}"),
        (["--threads", 100_000], f"--threads must be at most {os.cpu_count()}, got 100000"),
        (["--half"], "--half is for another Moshi"),
        *((["--device", name], "--device must be one of cpu") for name in ("", "foo", "meta")),
        (["--recent", CONTEXT], f"--recent must be at most {CONTEXT - 3}"),
        (["--chunk", 5000], "--chunk must be within the context"),
        (["pairs", "--frames", 200], "--frames of pairs must be at least 256"),
        (["pairs", "--rows", 1], "--rows of pairs must be at least 2"),
        (["--hf-repo", "a/b", "--data", "x.jsonl"], "--data must be a file, and x.jsonl is none"),
        (["--hf-repo", "a/b", "--data", __file__, "--level", "few"], "--level is of the testbed"),
        (["--hf-repo", "a/b", "--data", __file__, "--other-data", __file__], "of another kind"),
        (["generalisation", "--hf-repo", "a/b", "--data", __file__], "give --other-data too"),
        (["--hf-repo", "somebody/moshi"], "--data must be given"),
        (["--adapter", "nowhere"], "nowhere does not exist"),
        (["--adapter", "nowhere", "--recent", 5], "leave out --recent"),
        (["--only", "nothing"], "--only must be of 'full', 'stock'"),
        (["--recent", -1], "recent must be"),
        (["--device", "cuda:99"], "--device"),
        (["--threads", 0], "--threads must be"),
        *(
            ([f"--{name}", "gone", "--data", __file__], f"--{name} must be a file, and gone is")
            for name in ("moshi-weight", "mimi-weight", "tokenizer", "config-path", "lora-weight")
        ),
        (["--moshi-weight", __file__, "--data", __file__], "cannot be"),
    ],
)
def test_refusals(arguments, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = call(*arguments)
    assert result.exit_code == 2 and message in said(result)
    assert "Traceback" not in result.output and not Path("out").exists()


def test_out_must_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    result = call("--out", "file")
    assert result.exit_code == 2 and "--out must be a folder, got file" in said(result)


@pytest.mark.parametrize(
    ("sizes", "experiment", "message"),
    [
        ({"dep_q": 1}, "controls", "the model says dep_q=1 codebooks"),
        ({"dep_q": 4}, "unbounded", "the model has one voice"),
    ],
)
def test_models_that_cannot_be_measured_are_refused_first(
    sizes, experiment, message, monkeypatch, tmp_path
):
    class Info:
        lm_config = None

        def get_moshi(self, *_: object, **__: object) -> LMModel:
            return tiny(**sizes)

        def get_mimi(self, **_: object) -> None:
            raise AssertionError("nothing is tokenised")

    monkeypatch.setattr(model.Checkpoint, "info", lambda self: Info())
    result = call(experiment, "--hf-repo", "a/b", "--data", __file__)
    assert result.exit_code == 2 and message in said(result)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("step 3: the loss is nan"), "the loss is nan; 0 of 3 results"),
        (RuntimeError("probability tensor contains either `inf`, `nan`"), "0 of 3 results"),
        (PermissionError("no room"), "no room"),
        (ValueError("results/a.json is damaged"), "is damaged"),
        (RuntimeError("a fault of ours"), None),
    ],
)
def test_what_ends_an_evaluation_is_said(error, message, monkeypatch):
    def stop(*_: object) -> None:
        raise error

    monkeypatch.setattr(protocol.Bench, "_measure", stop)
    result = call("controls", "--frames", 64, "--only", "window")
    if message is None:
        assert result.exception is error
    else:
        assert result.exit_code == 2 and message in said(result)


def test_points_in_turn_and_then_the_whole(monkeypatch):
    names = "full", "window"
    monkeypatch.setattr(
        type(EXPERIMENTS["controls"]),
        "points",
        lambda self, plan: [protocol.Point(n, plan.arms()[n], (plan.listen(),)) for n in names],
    )
    monkeypatch.setattr(type(EXPERIMENTS["controls"]), "lines", lambda *_: ())
    options = "--rows", 2, "--frames", 128, "--out", "here"
    for name in names:
        result = call(*options, "--only", name)
        assert result.exit_code == 0 and f"Kept: {name}" in said(result)
    kept = {path: path.stat().st_mtime_ns for path in Path("here/results").glob("*.json")}
    assert len(kept) == 2
    result = call(*options)
    assert result.exit_code == 0 and "Recall: share of right answers" in said(result)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # nothing was done again
    record = json.loads(Path("here/controls/controls.json").read_text())
    assert record["rows"] == 2 and record["frames"] == 128 and record["seed"] == 0
    assert Path("here/controls/controls.png").stat().st_size > 10_000


def test_an_interruption_says_how_to_go_on(monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(protocol.Bench, "_measure", stop)
    result = call("untrained", "--rows", 2, "--frames", 64)
    assert result.exit_code == 130
    assert "interrupted; 0 of" in said(result)
    assert "kept in out/evaluate; the same command goes on from there" in said(result)
