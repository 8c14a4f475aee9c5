"""What `ttt-cache bench serve` shows of its levels: the table, the files, the picture."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
from bench_serve_support import call
from matplotlib.figure import Figure
from rich.console import Console

from ttt_cache.bench.serve import probe as probe_module
from ttt_cache.bench.serve import run as run_module
from ttt_cache.bench.serve.figures import Level
from ttt_cache.bench.serve.picture import draw
from ttt_cache.bench.serve.ramp import verdict
from ttt_cache.bench.serve.table import table_of

WORST = Level(16_384, broken=16_384, frames=4_096_000, lost=4_095_999, late_share=1.0,
              p50_ms=35_000.4, p95_ms=math.inf, p99_ms=math.inf, max_ms=math.inf,
              step_p50_ms=9.0, step_p99_ms=9999.9, behind_p99_ms=30.0)  # fmt: skip


def fast(clients: int, behind: float = 1.0) -> Level:
    return Level(clients, frames=250, late_share=0.0, p50_ms=41.25, p95_ms=44.0, p99_ms=45.0,
                 max_ms=50.0, behind_p99_ms=behind)  # fmt: skip


def test_the_table_is_whole_at_80_columns() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(table_of([WORST, Level(16_000, refused=16_000), fast(1)]))
    lines = capture.get().splitlines()
    assert "…" not in capture.get() and max(map(len, lines)) <= 80
    words = [line.split() for line in lines]
    assert ["1", "41.2", "44.0", "45.0", "50.0", "0.00%", "-", "yes"] in words
    assert ["16000", *"-----", "16000", "-", "no"] in words
    last = "16384 35000 never never never 100.00% 4095999 16384 10000 unknown"
    assert last.split() in words


def test_what_is_unknown_is_not_called_none() -> None:
    assert verdict({1: None, 2: False}) == verdict({1: None, 2: True}) == "unknown"
    assert verdict({2: None, 1: True}) == "at least 1"
    assert verdict({1: False, 2: None}) == verdict({}) == "0"
    assert verdict({1: True, 2: False, 3: None}) == "1"


@pytest.mark.parametrize(("behind", "says"), [(20.0, None), (20.004, "20.1"), (70.0, "70.0")])
def test_a_generator_that_is_late(behind, says, tmp_path: Path, monkeypatch) -> None:
    def measured(plan: Any, clients: int, delay: int, tick: Any) -> Level:
        return fast(clients, behind)

    monkeypatch.setattr(probe_module, "probe", lambda plan: 1)
    monkeypatch.setattr(run_module, "measure", measured)
    result = call("--clients", 1, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    with (tmp_path / "serve.csv").open() as file:
        (line,) = csv.DictReader(file)
    if says is None:
        assert "Held in real time: 1 (" in result.stdout and line["held"] == "True"
    else:
        assert f"was {says} ms late to send (p99; 20 allowed)" in result.stdout
        assert "Held in real time: unknown (" in result.stdout and line["held"] == "unknown"
        assert '"held": null' in (tmp_path / "serve.json").read_text()


def test_the_ticks_of_the_picture_are_plain_numbers(tmp_path: Path, monkeypatch) -> None:
    drawn: list[Figure] = []
    saves = Figure.savefig

    def save(figure: Figure, *args: Any, **kwargs: Any) -> None:
        saves(figure, *args, **kwargs)
        drawn.append(figure)

    monkeypatch.setattr(Figure, "savefig", save)
    draw([fast(1), fast(2)], "2", 2, "subtitle", tmp_path / "serve.png")
    time, late = drawn[0].axes
    low, high = time.get_ylim()
    ticks = time.yaxis.get_majorticklabels() + time.yaxis.get_minorticklabels()
    shown = [each.get_text() for each in ticks if low <= each.get_position()[1] <= high]
    assert [text for text in shown if text] == ["10", "20", "50", "100"]
    for axes in (time, late):
        assert all(float(at).is_integer() for at in axes.get_xticks())
    assert late.get_ylim() == (0, 1) and late.texts[0].get_text() == "no late frames"
