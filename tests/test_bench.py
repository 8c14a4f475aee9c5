"""`ttt-cache bench`: how arms take turns, what is written, and what is refused."""

from __future__ import annotations

import csv
import json
import re

import pytest
import torch
from bench_support import CPU, PLACE, small
from typer.testing import CliRunner

from ttt_cache.bench import plan as plans
from ttt_cache.bench import run as runs
from ttt_cache.bench.check import ALLOWED
from ttt_cache.bench.core import Core
from ttt_cache.bench.device import copy_bandwidth, matmul_rate
from ttt_cache.bench.timing import Eager, interleave
from ttt_cache.cli import main


def call(*arguments: object):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)], env={"COLUMNS": "200"})


def test_a_stock_ring_is_full_after_its_filling():
    core = Core(PLACE, 40)
    core.fill()
    ((x,), (p,)) = PLACE.frames(1)
    whole = core.step(x, p)
    core.streaming.kv_cache.cache[1][:, :, 20:] += 1
    core.streaming.kv_cache.end_offset -= 1
    core.streaming.offset -= 1
    assert (core.step(x, p) - whole).abs().max() > 0.1  # all of it is read
    assert core.state_bytes == 2 * 2 * 40 * 32 * 4


def test_arms_take_turns_and_samples_are_whole_chunks():
    log: list[tuple[str, int]] = []

    class Counter:
        def __init__(self, name):
            self.name = name

        def chunk(self, frames):
            log.append((self.name, len(frames[0])))
            return float(len(log))

    samples = interleave({n: Counter(n) for n in "abc"}, lambda: PLACE.frames(8), 3)
    assert [len(values) for values in samples.values()] == [3, 3, 3]
    assert {steps for _, steps in log} == {8}
    order = "".join(name for name, _ in log)
    assert sorted(order[i : i + 3] for i in range(3, 12, 3)) == ["abc", "bca", "cab"]
    assert len({order[i : i + 3] for i in range(0, 12, 3)}) == 3


def test_a_sample_is_the_mean_of_its_steps(monkeypatch):
    steps = []
    eager = Eager(lambda x, p: steps.append((x.shape, p.shape)))
    now = iter([5_000_000, 13_000_000])
    monkeypatch.setattr(eager, "clock", lambda: next(now))
    assert eager.chunk(PLACE.frames(4)) == 2.0
    assert steps == [((2, 1, 64), (2, 1, 192))] * 4


def test_rates_of_a_device():
    assert copy_bandwidth(CPU, 1 << 16) > 0
    assert matmul_rate(CPU, torch.float32, 32) > 0


def test_what_is_written(monkeypatch, tmp_path, capsys):
    from ttt_cache.files import make_folder

    make_folder("--out", tmp_path)
    result = runs.run(small(out=tmp_path))
    kept = json.loads((tmp_path / "bench.json").read_text())
    assert kept == json.loads(json.dumps(result))
    assert kept["settings"]["recent"] == 6 and kept["versions"]["torch"] == torch.__version__
    rows = {(row["arm"], row["batch"]): row for row in kept["rows"]}
    assert len(rows) == 10
    stock = rows["stock 90", 2]
    assert (stock["context"], stock["off"]) == (90, None)
    assert stock["state_bytes"] == 2 * 90 * 64 * 4
    for row in rows.values():
        assert len(row["samples_ms"]) == 3
        assert row["step_ms"] == sorted(row["samples_ms"])[1]
        assert row["frames_per_second"] == pytest.approx(row["batch"] / row["step_ms"] * 1e3)
    with (tmp_path / "bench.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["arm"] for line in lines] == [row["arm"] for row in kept["rows"]]
    assert {line["device"] for line in lines} == {kept["device"]}
    assert {line["torch"] for line in lines} == {torch.__version__}
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert re.search(r"stock 40 .*\(1\.000\)", said) and "FlexAttention is not here" in said


def test_a_wrong_answer_ends_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(ALLOWED, torch.float32, 0.0)
    monkeypatch.setattr(plans, "make_plan", lambda *arguments: small(out=tmp_path))
    result = call("--out", tmp_path)
    assert result.exit_code == 1
    assert "Nothing was timed" in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--batch", "two"], "must be a whole number, got 'two'"),
        (["--context", "100"], "--context must be at least 107, got 100"),
        (["--recent", "0"], "--recent must be at least 1, got 0"),
        (["--virtual", "0"], "--virtual must be at least 1, got 0"),
        (["--dtype", "int8"], "--dtype must be one of float32, bfloat16, float16, got 'int8'"),
        (["--device", "tpu"], "--device must be one of cpu"),
        (["--threads", "9999"], "--threads must be at most"),
        (["--repetitions", "2"], "--repetitions must be at least 3, got 2"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
    ],
)
def test_what_is_refused(arguments, says, tmp_path):
    result = call("--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2 and says in re.sub(r"\s+", " ", result.stderr)
    assert not (tmp_path / "out").exists()
