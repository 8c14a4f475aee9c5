"""`ttt-cache bench`: arms, their check, their turns, and what is written."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
import types
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from ttt_cache.bench import peers
from ttt_cache.bench import plan as plans
from ttt_cache.bench import run as runs
from ttt_cache.bench.arms import Arm, arms_of
from ttt_cache.bench.check import ALLOWED, WrongAnswerError, check, off
from ttt_cache.bench.core import Core, Place, Widths
from ttt_cache.bench.device import copy_bandwidth, matmul_rate
from ttt_cache.bench.measure import build
from ttt_cache.bench.plan import Plan, make_plan
from ttt_cache.bench.timing import Eager, interleave
from ttt_cache.cli import main

WIDTHS = Widths(64, 2)
CPU = torch.device("cpu")
PLACE = Place(2, CPU, torch.float32, widths=WIDTHS)
PATCHED = {"recent": 6, "virtual": 3, "chunk": 8}


def small(**changes) -> Plan:
    plan = make_plan([1, 2], (40, 90), recent=6, virtual=3, device="cpu", repetitions=3)
    return replace(plan, widths=WIDTHS, **changes)


def call(*arguments: object):
    return CliRunner().invoke(main, ["bench", *map(str, arguments)], env={"COLUMNS": "200"})


def test_cores_of_a_place_are_one_layer():
    one, other = (Core(PLACE, 40, PATCHED) for _ in range(2))
    for _ in range(30):
        ((x,), (p,)) = PLACE.frames(1)
        assert torch.equal(one.step(x, p), other.step(x, p))
    assert one.state is not None and one.state.readout.abs().max() > 0
    values = one.cache.reader.to_value  # or a memory would show nothing
    assert values.std() > 0.01


def test_every_arm_that_the_cpu_has_passes_its_check():
    arms, absent = arms_of(small())
    names = ["stock 40", "stock 90", "patched", "window", "two SDPA"]
    assert [arm.name for arm in arms] == names
    assert absent.keys() == {"patched, triton", "FlexAttention", "FlashInfer window"}
    assert "must be an NVIDIA GPU" in absent["patched, triton"]
    built, missing = build(arms, PLACE)
    seen = []
    apart = check(built, PLACE, 6, 8, 46, lambda: seen.append(1))
    assert not missing and len(seen) == 46
    assert apart.keys() == {"patched", "window", "two SDPA"}
    assert 0 < max(apart.values()) < ALLOWED[torch.float32]


@pytest.mark.parametrize(
    ("first", "said"),
    [(1, "is not stock Moshi at frame 1"), (14, "is not the reference path at frame 14")],
)
def test_no_speed_of_wrong_answers(first, said):
    """An arm that is wrong from some frame on; the memory is first read at frame 14."""

    def wrong(core):
        attend, calls = peers.two_sdpa(core), []

        def attend_wrongly(q, keys, values, seen):
            calls.append(seen)
            found = attend(q, keys, values, seen)
            late = sum(one is not None for one in calls) >= first
            return found * 1.01 if late else found

        return attend_wrongly

    arm = Arm("wrong", "", 90, PATCHED | {"gate": "head"}, peer=wrong)
    with pytest.raises(WrongAnswerError, match=f"wrong {said}: .*Nothing was timed"):
        check({"wrong": (arm, arm.build(PLACE))}, PLACE, 6, 8, 46)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flexattention_sees_what_it_may(monkeypatch):
    """Not compiled: that takes a GPU."""
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)
    arm = Arm("flex", "", 90, PATCHED | {"gate": "head"}, peer=peers.flex)
    apart = check({"flex": (arm, arm.build(PLACE))}, PLACE, 6, 8, 40)
    assert 0 < apart["flex"] < 1e-5


class FakeWrapper:
    """What FlashInfer's documentation says of its wrapper, in PyTorch."""

    def __init__(self, room, layout, **buffers):
        assert layout == "HND" and buffers["use_cuda_graph"]

    def plan(self, starts, pages, lengths, heads, kv_heads, width, page, **dtypes):
        assert starts.tolist() == [0, 1, 2] and pages.tolist() == [0, 1]
        assert lengths.tolist() == [page] * 2 and (heads, kv_heads, width) == (2, 2, 32)

    def run(self, q, cache):
        keys, values = cache  # [pages, heads, page, width]
        scores = (q[:, :, None] @ keys.transpose(-1, -2)) / 32**0.5
        return (scores.softmax(-1) @ values)[:, :, 0]


def test_flashinfer_reads_a_full_ring_as_one_page(monkeypatch):
    fake = types.ModuleType("flashinfer")
    monkeypatch.setattr(fake, "BatchDecodeWithPagedKVCacheWrapper", FakeWrapper, raising=False)
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    settings, peer = {"recent": 6, "memory": "none"}, peers.flashinfer_window
    arm = Arm("full", "", 90, settings, peer=peer, partial=False)
    apart = check({"full": (arm, arm.build(PLACE))}, PLACE, 6, 8, 20)
    assert 0 < apart["full"] < 1e-5
    early = replace(arm, partial=True)  # before its window is full it sees empty slots
    with pytest.raises(WrongAnswerError, match="frame 1"):
        check({"full": (early, early.build(PLACE))}, PLACE, 6, 8, 20)


def test_nan_is_wrong():
    assert math.isnan(off(torch.tensor([math.nan]), torch.ones(1)))
    arm = Arm("broken", "", 90, PATCHED, peer=lambda core: lambda q, *rest: q * math.nan)
    with pytest.raises(WrongAnswerError, match="off by nan"):
        check({"broken": (arm, arm.build(PLACE))}, PLACE, 6, 8, 10)


def test_what_cannot_be_set_up_is_said_unless_it_is_ours():
    def fail(core):
        raise OSError("no library")

    good, bad = Arm("own", "", 90, PATCHED), Arm("other", "", 90, PATCHED, peer=fail)
    built, absent = build([good, bad], PLACE)
    assert list(built) == ["own"]
    assert absent == {"other": "it could not be set up: no library"}
    with pytest.raises(ValueError, match="TTT_CACHE_BACKEND=triton cannot be had"):
        build([Arm("own", "", 90, PATCHED, "triton")], PLACE)


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
    monkeypatch.setattr(plans, "MOSHI", WIDTHS)
    monkeypatch.setattr(Plan, "widths", WIDTHS)
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
