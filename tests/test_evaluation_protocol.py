"""Evaluations that are interrupted, repeated and shared between processes."""

from __future__ import annotations

import io
import json
import threading
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from evaluation_support import SETTINGS, recipe, subject, tiny
from rich.console import Console

import ttt_cache
from ttt_cache.evaluation import protocol
from ttt_cache.evaluation.checkpoint import Results, lock
from ttt_cache.evaluation.hashes import base_hash
from ttt_cache.evaluation.lines import Line, table_of
from ttt_cache.evaluation.measures import Cost, Listen, Run, Span, Speak
from ttt_cache.evaluation.protocol import Bench, Point, as_json
from ttt_cache.evaluation.recall import Recall
from ttt_cache.evaluation.source import TestbedSource


@dataclass(frozen=True)
class Counting:
    """A measure that tells what it was asked of."""

    detail: int = 0

    name: ClassVar[str] = "counting"
    seen: ClassVar[list[tuple[int, int]]] = []
    stop_at: ClassVar[int | None] = None

    def __call__(self, run: Run) -> dict[str, Any]:
        recent = next(iter(run.handle.caches.values())).window.recent
        if recent == self.stop_at:
            raise KeyboardInterrupt
        self.seen.append((recent, self.detail))
        assert ttt_cache.adapter_parameters(run.lm) is not None  # it is patched
        return {"recent": recent, "nothing": float("nan")}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Counting, "seen", [])
    monkeypatch.setattr(Counting, "stop_at", None)


def window(recent: int, *measures: Any, **more: Any) -> Point:
    arm = protocol.Arm(f"window {recent}", "", {"recent": recent, "memory": "none"})
    return Point(arm.name, arm, measures or (Counting(),), **more)


def bench(folder: Path, given=None) -> Bench:
    quiet = Console(file=io.StringIO())
    return Bench(given or subject(), folder / "results", folder / "adapters", quiet)


def test_what_was_measured_is_not_measured_again(tmp_path):
    points = [window(4), window(5)]
    first = bench(tmp_path).evaluate(points)
    assert first["window 4"]["counting"] == {"recent": 4, "nothing": None}
    assert bench(tmp_path).evaluate(points) == first
    assert Counting.seen == [(4, 0), (5, 0)]


def test_an_interrupted_evaluation_goes_on(tmp_path, monkeypatch):
    points = [window(4), window(5), window(6)]
    monkeypatch.setattr(Counting, "stop_at", 5)
    stopped = bench(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        stopped.evaluate(points)
    assert stopped.kept().startswith("1 of 3 results")
    assert not ttt_cache.targets.find_transformer(stopped.subject.lm).__dict__.get("ttt_cache")
    monkeypatch.setattr(Counting, "stop_at", None)
    assert list(bench(tmp_path).evaluate(points)) == ["window 4", "window 5", "window 6"]
    assert Counting.seen == [(4, 0), (5, 0), (6, 0)]


@pytest.mark.parametrize("change", ["seed", "source", "base", "built", "measure", "settings"])
def test_nothing_stale_is_reused(change, tmp_path):
    bench(tmp_path).evaluate([window(4)])
    others = {
        "seed": (subject(seed=1), window(4)),
        "source": (subject(source=TestbedSource("many")), window(4)),
        "base": (subject(tiny(seed=3)), window(4)),
        "built": (subject(tiny(context=32)), window(4)),  # of the same weights
        "measure": (subject(), window(4, Counting(1))),
        "settings": (subject(), replace(window(5), name="window 4")),
    }
    given, point = others[change]
    bench(tmp_path, given).evaluate([point])
    assert len(Counting.seen) == 2


def test_an_adapter_of_other_weights_is_measured_anew(tmp_path):
    lm = tiny()
    arm = protocol.Arm("memory", "", SETTINGS, trained=True)
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        with ttt_cache.patch(lm, **SETTINGS):
            adapter = ttt_cache.save_adapter(lm, tmp_path / "adapter")
        point = Point("memory", arm, (Counting(),))
        bench(tmp_path, subject(lm, adapter=adapter)).evaluate([point])
    assert len(Counting.seen) == 2
    assert not (tmp_path / "adapters").exists()  # what the user gave was taken


def test_a_recipe_of_its_own_is_trained_even_where_an_adapter_is_given(tmp_path):
    lm = tiny()
    with ttt_cache.patch(lm, **SETTINGS):
        adapter = ttt_cache.save_adapter(lm, tmp_path / "given")
    arm = protocol.Arm("memory", "", SETTINGS, trained=True)
    point = Point("memory", arm, (Counting(),), recipe=recipe())
    bench(tmp_path, subject(lm, adapter=adapter)).evaluate([point])
    (trained,) = (p for p in (tmp_path / "adapters").iterdir() if p.is_dir())
    made = json.loads((trained / "training.json").read_text())["made"]
    assert made["recipe"]["tune"]["stages"] == [[40, 2, 1]]  # stretched to this model's context


def test_wide_windows_are_trained_on_long_sequences(tmp_path):
    arm = protocol.Arm("memory", "", {**SETTINGS, "recent": 24}, trained=True)
    point = Point("memory", arm, (Counting(),), recipe=recipe(frames=10))
    bench(tmp_path).evaluate([point])
    (trained,) = (p for p in (tmp_path / "adapters").iterdir() if p.is_dir())
    made = json.loads((trained / "training.json").read_text())["made"]
    assert made["recipe"]["distill"]["stages"] == [[56, 2, 1]]  # twice (24 + 4)


def test_a_cost_is_that_of_the_leanest_form(tmp_path):
    """What computes more state than it needs is heard as it is, and costed without."""
    lean = {"recent": 9, "memory": "none"}
    arm = protocol.Arm("window", "", {"recent": 6, "memory": "none"}, lean=lean)
    bench(tmp_path).evaluate([Point("window", arm, (Counting(), Cost(2)))])
    held = [json.loads(path.read_text())["made"] for path in (tmp_path / "results").glob("*.json")]
    recents = {made["measure"]: made["arm"]["recent"] for made in held}
    assert recents == {"Counting": 6, "Cost": 9}


def test_what_cannot_be_trained_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    source = TestbedSource("few")
    monkeypatch.setattr(source, "longest", 39, raising=False)
    arm = protocol.Arm("memory", "", SETTINGS, trained=True)
    points = [window(4), Point("memory", arm, (Counting(),), recipe=recipe(frames=40))]
    with pytest.raises(ValueError, match="sequences of 40 frames"):
        bench(tmp_path, subject(source=source)).evaluate(points)
    assert not Counting.seen
    assert list(bench(tmp_path, subject(source=source)).evaluate(points, ["window 4"]))


def test_points_that_another_process_works_on_come_last(tmp_path):
    points, given = [window(4), window(5)], bench(tmp_path)
    taken, done = threading.Event(), threading.Event()

    def other() -> None:
        with lock(given.lock_of(points[0])):
            taken.set()
            while (5, 0) not in Counting.seen and not done.wait(0.01):
                pass

    thread = threading.Thread(target=other)
    thread.start()
    taken.wait()
    try:
        given.evaluate(points)
    finally:
        done.set()
        thread.join()
    assert Counting.seen == [(5, 0), (4, 0)]


def test_another_experiment_does_not_wait_for_a_point_of_the_same_name(tmp_path):
    given = bench(tmp_path)
    with lock(given.lock_of(window(4))):
        given.evaluate([window(4, Counting(1))])
    assert Counting.seen == [(4, 1)]


def test_only_some_points(tmp_path):
    assert list(bench(tmp_path).evaluate([window(4), window(5)], ["window 5"])) == ["window 5"]


def test_a_result_that_is_cut_short_is_not_there(tmp_path):
    results, made = Results(tmp_path), {"a": 1}
    with pytest.raises(ValueError):
        results.put(made, {"figure": float("nan")}, 1.0)
    assert results.get(made) is None and not list(tmp_path.iterdir())
    results.put(made, {"figure": 2.5}, 1.0)
    kept = results.get(made)
    assert kept is not None and kept.result == {"figure": 2.5} and results.get({"a": 2}) is None
    assert abs(datetime.now(UTC) - datetime.fromisoformat(kept.date)) < timedelta(minutes=1)


def test_when_it_was_measured_stays_with_a_result(tmp_path):
    bench(tmp_path).evaluate([window(4)])
    (file,) = (tmp_path / "results").glob("*.json")
    held = json.loads(file.read_text())
    file.write_text(json.dumps(held | {"date": "2026-01-02T03:04:05+00:00"}))
    found = bench(tmp_path).evaluate([window(4)])
    assert found["window 4"]["measured"] == {"counting": "2026-01-02T03:04:05+00:00"}


HELD = {"made": {"a": 1}, "date": "2026-01-02T03:04:05+00:00", "result": {"figure": 2.5}}


@pytest.mark.parametrize(
    "text",
    [
        *("", "{}", "[]", "null", json.dumps(HELD)[:-9], "\ufffe\x00"),
        *(json.dumps(HELD | change) for change in ({"result": 3}, {"made": {}}, {"date": "now"})),
    ],
)
def test_a_damaged_result_is_named_and_not_used(text, tmp_path):
    results, made = Results(tmp_path), {"a": 1}
    results.put(made, {"figure": 2.5}, 1.0)
    (file,) = tmp_path.iterdir()
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"{file.name} is damaged; delete it"):
        results.get(made)


@pytest.mark.parametrize(
    ("measure", "count"), [(Cost(2), 2), (Speak(1, 64), 2), (Counting(), 1)], ids=str
)
def test_times_are_those_of_one_machine(measure, count, tmp_path, monkeypatch):
    for threads in (1, 1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        bench(tmp_path).evaluate([window(4, measure)])
    assert len(list((tmp_path / "results").glob("*.json"))) == count


@pytest.mark.parametrize(
    "change",
    [
        {"context": 32},
        {"delays": [0, 0, 1, 0, 2]},
        {"max_period": 500},
        {"num_heads": 4},
        {"norm": "rms_norm"},
        {"gating": "gelu"},
        {"existing_text_padding_id": 2},
    ],
    ids=str,
)
def test_the_base_is_told_by_how_it_is_built(change):
    assert base_hash(tiny(**change)) != base_hash(tiny()) == base_hash(tiny())


def test_waiting_for_another_process_is_said(tmp_path):
    said: list[str] = []
    with lock(tmp_path / "a"):
        with lock(tmp_path / "a", wait=False, say=said.append) as held:
            assert not held and not said
        thread = threading.Thread(target=_take, args=(tmp_path / "a", said))
        thread.start()
        while not said:
            thread.join(0.01)
    thread.join()
    assert len(said) == 1 and str(tmp_path / "a") in said[0]


def _take(path: Path, said: list[str]) -> None:
    with lock(path, say=said.append) as held:
        assert held


def test_values_become_plain_json():
    assert as_json({1: (2.0, float("inf")), "x": Span("a", 0, 2)}) == {
        "1": [2.0, None],
        "x": ["a", 0, 2],
    }
    assert as_json(Counting(3)) == {"detail": 3}


def test_spans_count_what_is_in_them():
    """Recall over all spans together is recall over the whole."""
    lm, frames = tiny(), 300
    source = TestbedSource("rewritten")
    spans = (Span("one", 0, 130), Span("two", 130, 300), Span("all", 0, 300))
    with ttt_cache.patch(lm, **SETTINGS) as handle:
        found = Listen(2, frames, 6, 4, spans)(Run(lm, handle, source, 0))
    asked = {
        name: Recall.from_json(held).tallies["age"].counts.sum().item()
        for name, held in found["recall"].items()
    }
    assert asked["all"] == asked["one"] + asked["two"] > 0
    assert min(asked.values()) > 0


@pytest.mark.parametrize(
    ("value", "given", "verdict"),
    [
        (0.98, {"at_least": 0.98}, "met"),
        (0.9799999, {"at_least": 0.98}, "MISSED"),
        (0.0100001, {"at_most": 0.01}, "MISSED"),
        (None, {"at_most": 1.0}, "not measured"),
        (None, {}, ""),
        (5.0, {}, ""),
    ],
)
def test_verdicts(value, given, verdict):
    line = Line("figure", value, **given)
    assert line.verdict == verdict == line.as_json()["verdict"]
    assert table_of([line]).row_count == 1
