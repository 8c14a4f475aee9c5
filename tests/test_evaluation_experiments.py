"""The experiments of the plan: their points, and what is made of their results."""

from __future__ import annotations

import io
import json
from functools import partial

import pytest
from evaluation_support import CONTEXT, SETTINGS, recipe, subject, tiny
from rich.console import Console

import ttt_cache
from ttt_cache.evaluation import arms, protocol
from ttt_cache.evaluation.experiments import (
    ALL,
    EXPERIMENTS,
    Plan,
    controls,
    generalisation,
    sweeps,
    unbounded,
)
from ttt_cache.evaluation.experiments import training as training_experiment
from ttt_cache.evaluation.findings import read
from ttt_cache.evaluation.measures import Cost, Early
from ttt_cache.evaluation.protocol import Bench
from ttt_cache.evaluation.run import conduct
from ttt_cache.evaluation.source import TestbedSource

OTHER = TestbedSource("dialect")


@pytest.fixture(autouse=True)
def short_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "DEFAULT", recipe(0, 1))
    monkeypatch.setattr(arms, "HYBRID", recipe(0, 1, moshi=1.0))
    monkeypatch.setattr(sweeps, "SWEEP", recipe(0, 1))
    monkeypatch.setattr(generalisation, "SWEEP", recipe(0, 1))
    monkeypatch.setattr(training_experiment, "SWEEP", recipe(0, 2))
    for module in (controls, sweeps):
        monkeypatch.setattr(module, "Cost", partial(Cost, frames=20))


def plan(frames: int = 130, rows: int = 2, **changes) -> Plan:
    return Plan(subject(other=OTHER, **changes), rows, frames)


def test_every_experiment_of_the_plan_has_a_command():
    assert list(EXPERIMENTS) == [
        *("controls", "recent", "virtual", "gates", "layers", "training", "unbounded"),
        *("untrained", "generalisation", "pairs"),
    ]


@pytest.mark.parametrize("experiment", ALL, ids=lambda experiment: experiment.name)
def test_points_can_be_patched_and_are_told_apart(experiment):
    given = plan(CONTEXT * 8, rows=3)
    points = experiment.points(given)
    assert len({point.name for point in points}) == len(points)
    for point in points:
        with ttt_cache.patch(given.subject.lm, **point.arm.settings):
            pass


def test_sweeps_are_those_of_the_plan():
    lm = tiny(context=3000, num_layers=32)
    given = plan(24000, rows=3, lm=lm)
    names = {name: [p.name for p in EXPERIMENTS[name].points(given)] for name in EXPERIMENTS}
    windows = [f"recent {n}" for n in (50, 100, 200, 500, 1000)]
    assert [name for name in names["recent"] if name.startswith("recent")] == windows
    assert {f"virtual {n}" for n in (1, 10, 100)} <= set(names["virtual"])
    assert [n for n in names["layers"] if "top" in n] == [
        f"top {count} of 32 layers" for count in (7, 16, 32)
    ]
    (top,) = (p for p in EXPERIMENTS["layers"].points(given) if p.name.startswith("top 7"))
    assert top.arm.settings["layers"] == tuple(range(25, 32))
    assert {n.split()[-1] for n in names["gates"] if n.startswith("gate")} == {
        *("joint", "fixed", "layer", "head", "query", "residual")
    }
    assert EXPERIMENTS["unbounded"].frames(given.subject) == 100_000


def test_windows_follow_the_context():
    testbed = plan(8192, lm=tiny(context=1024))
    names = [point.name for point in EXPERIMENTS["recent"].points(testbed)]
    assert [n for n in names if n.startswith("window ")] == [
        f"window {n}" for n in (17, 34, 68, 171, 341)
    ]


def test_every_point_of_a_sweep_counts_the_same_facts_as_far():
    points = EXPERIMENTS["recent"].points(plan(8192, lm=tiny(context=1024)))
    (listen,) = {point.measures[0] for point in points}
    assert listen.recent == 341 and listen.chunk == SETTINGS["chunk"]


@pytest.mark.parametrize("name", ["controls", "training", "unbounded", "generalisation", "layers"])
def test_an_experiment_from_its_points_to_its_files(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setattr(unbounded, "FRAMES", 4 * CONTEXT)
    experiment, given = EXPERIMENTS[name], plan(4 * CONTEXT, is_testbed=True)
    points = experiment.points(given)
    if name != "generalisation":  # one that trains, beside what it is compared with
        keep = {"full", "stock", "extended", "window", "random", "reset", "hierarchical"}
        points = [p for p in points if p.name in keep or p.recipe is not None]
    bench = Bench(given.subject, tmp_path / "r", tmp_path / "a", Console(file=io.StringIO()))
    conduct(experiment, given, points, bench, tmp_path)
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["points"].keys() == {point.name for point in points}
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(point.name.split(",")[0] in printed for point in points)
    lines = {line["name"]: line for line in record["targets"]}
    verdicts = {name: line["verdict"] for name, line in lines.items()}
    if name == "controls":
        assert verdicts["memory reset beside window only, cross-entropy"] == "met"
        size = {arm: record["points"][arm]["cost"]["state_bytes"] for arm in keep}
        share = lines["state, share of the ring's bytes"]
        assert share["value"] == size["hierarchical"] / size["stock"]
        assert share["value"] > 1 / 8 and share["verdict"] == "MISSED"
        assert record["points"]["full"]["excess"]["1x"][0] == 0
        assert verdicts["recall far, at 8x, of full context's"] == "not measured"
    if name == "unbounded":
        assert verdicts["growth of state (bytes)"] == "met"


def test_targets_at_the_beginning_are_of_many_short_conversations(tmp_path):
    experiment, given = EXPERIMENTS["controls"], plan(4 * CONTEXT, is_testbed=True)
    early = given.early()
    assert (early.rows, early.frames) == (8 * given.rows, CONTEXT)
    points = [p for p in experiment.points(given) if p.name in ("full", "window")]
    bench = Bench(given.subject, tmp_path / "r", tmp_path / "a", Console(file=io.StringIO()))
    findings = read(points, bench.evaluate(points))
    for finding in findings.values():
        assert finding.early.crossentropy.files == early.rows
        assert finding.crossentropy.files == given.rows
    (line,) = [
        line
        for line in controls._of_recall(
            given, findings | {"hierarchical": findings["window"], "stock": findings["full"]}
        )
        if line.name.endswith("window alone")
    ]
    assert line.value == findings["window"].early.share(given.spans[0])[0]
    elsewhere = experiment.points(plan(4 * CONTEXT))
    assert not any(isinstance(measure, Early) for p in elsewhere for measure in p.measures)


@pytest.mark.parametrize("experiment", ALL, ids=lambda experiment: experiment.name)
def test_every_control_stands_beside_every_experiment(experiment):
    given = plan(CONTEXT * 8, rows=3)
    points, arms = experiment.points(given), given.arms()
    beside = {(p.series or p.name, p.source): p.arm for p in points if p.recipe is None}
    wanted = {(name, point.source) for name in arms for point in points}
    assert wanted - beside.keys() == ({("full", None)} if experiment.name == "unbounded" else set())
    for (name, _), arm in beside.items():
        if name in arms and name != "full":  # which is as long as the longest conversation
            assert arm == arms[name]


def test_one_point_alone_says_that_the_others_are_missing(tmp_path, capsys):
    experiment, given = EXPERIMENTS["gates"], plan()
    bench = Bench(given.subject, tmp_path / "r", tmp_path / "a", Console(file=io.StringIO()))
    conduct(experiment, given, experiment.points(given), bench, tmp_path, ["window"])
    printed = capsys.readouterr().out
    assert "Recall" in printed and "Cross-entropy" in printed
    assert "Kept: window. Without --only" in printed
    assert not (tmp_path / "gates.json").exists()


def test_generalisation_needs_two_kinds():
    with pytest.raises(ValueError, match="give --other-data too"):
        EXPERIMENTS["generalisation"].points(Plan(subject(), 2, 200))


def test_generalisation_trains_on_each_and_measures_on_both():
    points = EXPERIMENTS["generalisation"].points(plan())
    trained = {(p.taught.name, p.source.name) for p in points if p.taught is not None}
    kinds = "testbed few", "testbed dialect"
    assert trained == {(a, b) for a in kinds for b in kinds}
