"""Tables and JSON of the evaluation: what was measured is shown, and as it was measured."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console
from rich.table import Table

from ttt_cache.evaluation import tables
from ttt_cache.evaluation.arms import Arm
from ttt_cache.evaluation.crossentropy import CrossEntropy
from ttt_cache.evaluation.findings import Finding
from ttt_cache.evaluation.forced import Scores
from ttt_cache.evaluation.measures import Span
from ttt_cache.evaluation.pairs import Pairs, Place
from ttt_cache.evaluation.protocol import Point
from ttt_cache.evaluation.recall import Recall
from ttt_cache.testbed.stream import NONE

FRAMES, WINDOW = 64, 16
SPAN = Span("1x", 0, FRAMES)


def finding(name: str, nats: float, beyond: float, right: bool = True, **results) -> Finding:
    """Three conversations; every eighth frame asks for a far fact, load 2, overwritten thrice."""
    text = torch.full((3, FRAMES), nats)
    text[:, WINDOW:] += beyond
    choices = torch.full((3, 3, FRAMES), 5 if right else 6)
    scores = Scores(0, text, torch.full_like(text, 0.25), torch.full_like(text, 0.5), choices)
    heard, recall = CrossEntropy(), Recall(4, 2)
    heard.add(scores)
    marks = {n: torch.zeros(3, FRAMES, dtype=torch.long) for n in ("age", "load", "rewritten")}
    marks |= {n: torch.full((3, FRAMES), NONE) for n in ("answer", "voice")}
    marks["answer"][:, ::8] = 5
    for mark, value in (("age", 20), ("load", 2), ("rewritten", 3)):
        marks[mark][:, ::8] = value
    recall.add(scores, marks)
    return Finding(Point(name, Arm(name, ""), ()), heard, {"1x": recall}, results)


def shown(table: Table) -> list[str]:
    console = Console(width=170, file=io.StringIO())
    console.print(table)
    return console.file.getvalue().splitlines()


def line(table: Table, name: str) -> list[str]:
    (found,) = (row for row in shown(table) if row.startswith(f"│ {name} "))
    return [cell.strip() for cell in found.strip("│").split("│")]


@pytest.fixture
def both() -> dict[str, Finding]:
    return {"full": finding("full", 1.0, 0.0), "window": finding("window", 1.0, 0.5, False)}


def test_streams_are_shown_apart(both):
    table = tables.parts_table(both, Span("late", 32, 64))
    assert [cell.split()[0] for cell in line(table, "full")[1:3]] == ["1.0000", "0.2500"]
    assert line(table, "window")[1] == "1.5000 [1.500, 1.500]"


def test_a_jump_is_in_the_stream_that_jumps(both):
    cells = line(tables.jump_table(both, WINDOW, "full"), "window")
    assert cells[1] == "+50.0% [+50.0%, +50.0%]"
    assert cells[2] == cells[3] == "+0.0% [+0.0%, +0.0%]"
    assert line(tables.jump_table(both, WINDOW, "nobody"), "window")[1] == "-"
    assert line(tables.jump_table(both, FRAMES, "full"), "window")[1] == "-"


def test_a_slope_is_that_beyond_the_window(both):
    assert line(tables.slope_table(both, WINDOW), "window")[1].lstrip("+-").startswith("0.0000 [")
    assert float(line(tables.slope_table(both, WINDOW // 2), "window")[1].split()[0]) > 0.05


def test_recall_by_load_and_overwritings_with_its_questions(both):
    for by, name in (("load", "2"), ("rewritten", "2-3")):
        table = tables.recall_by_table(both, SPAN, by, "what")
        assert [column.header for column in table.columns] == ["what", name]
        assert line(table, "full")[1] == "1.000" and line(table, "window")[1] == "0.000"
        assert line(table, "questions")[1] == "24"
    assert "n = 24" in "\n".join(shown(tables.recall_table(both, [SPAN])))


def test_attention_is_in_bits_and_of_all_it_could_be():
    layer = {"mass": [0.25, 0.5], "virtual": 4, "entropy": [math.log(4), math.log(2)]}
    one = {"mass": [0.1], "virtual": 1, "entropy": [0.0]}
    unread = {"mass": None, "virtual": 4, "entropy": None}
    mass = {"0": layer, "1": one, "2": {"mass": [0.75]}, "3": unread}
    rows = [
        [cell.strip() for cell in row.strip("│").split("│")][1:]
        for row in shown(tables.mass_table({"a": finding("a", 1, 0, mass=mass)}))
        if row.startswith("│ a")
    ]
    assert rows[0] == ["0", "4", "0.250  0.500", "2.000  1.000", "1.000  0.500"]
    assert rows[1] == ["1", "1", "0.100", "0.000", "-"]
    assert rows[2] == ["2", "-", "0.750", "-", "-"]
    assert rows[3] == ["3", "4", "-", "-", "-"]


def test_no_table_is_wider_than_170_columns(both):
    for table in (
        tables.parts_table(both, SPAN),
        tables.jump_table(both, WINDOW, "full"),
        tables.slope_table(both, WINDOW),
        tables.recall_table(both, [SPAN] * 4),
    ):
        assert Console(width=400).measure(table).maximum <= 170


def test_json_has_all_that_was_measured(both):
    counted = Pairs(("other",), [Place(256, 0)], 2)
    counted.add("other", Place(256, 0), torch.tensor([1.0, 3.0]))
    mine = finding("mine", 1.0, 0.5, pairs=counted.as_json())
    found = json.loads(json.dumps(mine.as_json([SPAN], both["full"], WINDOW)))
    assert found["by_position"]["text"]["by_position"][-1][0] == pytest.approx(1.5)
    assert found["by_position"]["text"]["jump"][0] == pytest.approx(0.5)
    assert found["beside"]["text"]["jump"][0] == pytest.approx(0.5)
    assert found["by_position"]["first"]["slope"][0] == pytest.approx(0, abs=1e-9)
    (load,) = found["recall_by"]["1x"]["by_load"]
    assert (load["begin"], load["end"], load["asked"]) == (2, 3, 24)
    assert found["pairs"][0]["margin"][0] == 2 and found["pairs"][0]["pairs"] == 2


def test_a_result_carries_its_date(both):
    measured = {"listen": "2026-11-23T18:28:19+00:00"}
    found = finding("mine", 1.0, 0.5, measured=measured).as_json([SPAN], both["full"], WINDOW)
    assert found["measured"] == measured
