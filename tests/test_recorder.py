"""Figures on their way to files, TensorBoard, W&B and a person; and what is left after a kill."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from ttt_cache.training.bar import Bar, status
from ttt_cache.training.recorder import Recorder, read_metrics


def lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def record(folder: Path, steps: range, total: int = 100, **settings) -> None:
    """A run of these steps, the first of them after those before."""
    with Recorder(folder, total, first_step=steps.start - 1, **settings) as recorder:
        for step in steps:
            recorder.log(step, {"loss": 1 / step, "frames": 80 * step}, "compressor")


def test_every_step_is_a_line_and_a_point(tmp_path):
    figures = {"loss": torch.tensor(0.25), "gate/25": 0.125, "frames": 12}
    with Recorder(tmp_path / "new" / "run", 2, config={"lr": 1e-3}) as recorder:
        recorder.log(1, figures, "distil")
        # There already, although nothing is closed:
        assert json.loads(lines(recorder.run_dir)[0]) == {
            "step": 1,
            "stage": "distil",
            "loss": 0.25,
            "gate/25": 0.125,
            "frames": 12,
        }
        recorder.log(2, {"loss": 0.2}, "memory")
        recorder.log(2, {"eval/loss": 0.3}, "memory")
    found = read_metrics(recorder.path)
    assert [(r["step"], r["stage"]) for r in found] == [(1, "distil"), (2, "memory"), (2, "memory")]
    assert isinstance(found[0]["frames"], int)
    board = EventAccumulator(str(recorder.run_dir / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == {"loss", "gate/25", "frames", "eval/loss"}
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [
        (1, 0.25),
        (2, pytest.approx(0.2)),
    ]
    text = board.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"lr": 0.001' in text


def test_what_is_not_finite_is_null(tmp_path, capsys):
    with Recorder(tmp_path, 1) as recorder:
        values = {"loss": math.nan, "grad_norm": math.inf, "kl": torch.tensor(-math.inf)}
        recorder.log(1, values, "memory")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    found = json.loads(lines(tmp_path)[0], parse_constant=refuse)
    assert found == {"step": 1, "stage": "memory", "loss": None, "grad_norm": None, "kl": None}
    assert read_metrics(recorder.path) == [found]
    assert "loss nan" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["much", None, [1.0], torch.zeros(2)])
def test_a_figure_is_a_number(tmp_path, value):
    with Recorder(tmp_path, 1) as recorder:
        with pytest.raises(TypeError, match="figure 'loss' must be a number"):
            recorder.log(1, {"loss": value}, "memory")
        recorder.log(1, {"loss": 1.0}, "memory")
    assert len(lines(tmp_path)) == 1


def test_resuming_repeats_nothing(tmp_path, monkeypatch):
    # Files of one second and process are read in the order of their names, where 10 is before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    record(tmp_path, range(1, 8))
    before = lines(tmp_path)
    record(tmp_path, range(5, 11))  # from the checkpoint of step 4
    assert lines(tmp_path)[:7] == before
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 11))
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars("loss")] == list(range(1, 11))
    with Recorder(tmp_path, 100, first_step=10):
        pass
    assert len(lines(tmp_path)) == 10
    for _ in range(2):
        with Recorder(tmp_path, 100) as recorder:  # anew, and killed before the first checkpoint
            recorder.log(0, {"eval/loss": 1.0}, "memory")
    assert [r["step"] for r in read_metrics(recorder.path)] == [0]


@pytest.mark.parametrize("torn", [b'{"step": 4, "sta', b'{"step": 4, "stage": "a"}', b"\0\0"])
def test_a_torn_last_line_goes(tmp_path, torn):
    record(tmp_path, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    record(tmp_path, range(4, 6))
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("line", ["{", "[1]", '{"step": "2", "stage": "a"}', '{"step": 2}', ""])
def test_a_damaged_line_is_named_before_anything_changes(tmp_path, line):
    record(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    first, _, third = lines(tmp_path)
    path.write_text(f"{first}\n{line}\n{third}\n")
    damaged = path.read_bytes()
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: must be a JSON object"):
        read_metrics(path)
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: .* remove the line"):
        Recorder(tmp_path, 10, first_step=3)
    assert path.read_bytes() == damaged
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        read_metrics(tmp_path / "absent.jsonl")


def test_a_disk_that_fills_up_while_old_steps_are_dropped(tmp_path, monkeypatch):
    record(tmp_path, range(1, 4))
    before = lines(tmp_path)

    def full(self, data):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        record(tmp_path, range(3, 5))
    monkeypatch.undo()
    assert lines(tmp_path) == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_named(tmp_path):
    with Recorder(tmp_path, 10) as recorder:
        recorder.path.symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
            recorder.log(1, {"loss": 1.0}, "memory")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_disk_that_tensorboard_finds_full_is_named_once(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    with (
        pytest.raises(OSError, match=r"No space left on device: .*tensorboard"),
        Recorder(tmp_path, 10) as recorder,
    ):
        events = recorder._board._writer.file_writer.event_writer
        events._general_file_writer.filename = b"/dev/full"
        for step in range(1, 100):
            recorder.log(step, {"loss": 1.0}, "memory")
            events.flush()
    assert not told
    assert threading.excepthook == told.append


KILLED = """
import os, signal, sys
from pathlib import Path
from ttt_cache.training.recorder import Recorder
with Recorder(Path(sys.argv[1]), 10) as recorder:
    for step in range(1, 6):
        recorder.log(step, {"loss": 1 / step}, "memory")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_9_loses_no_step(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert "memory 1/10 loss 1" in done.stderr.decode()


def test_an_exception_closes_everything(tmp_path):
    with pytest.raises(KeyError, match="mine"), Recorder(tmp_path, 10) as recorder:
        recorder.log(1, {"loss": 1.0}, "memory")
        raise KeyError("mine")
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars("loss")] == [1]


def test_other_processes_record_nothing(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # cannot be imported
    folder = tmp_path / "run"
    with Recorder(folder, 10, wandb={"project": "p"}, main=False) as recorder:
        recorder.log(1, {"loss": "not even looked at"}, "memory")
    assert not folder.exists()
    assert capfd.readouterr() == ("", "")


def test_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RuntimeError, match=r"pip install 'ttt-cache\[train\]'"):
        Recorder(tmp_path / "run", 10)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("there", [None, types.ModuleType("wandb")])
def test_without_wandb(tmp_path, monkeypatch, there):
    """It is not installed, or a folder that W&B left behind is found instead."""
    if there is not None:
        there.__path__ = ["wandb"]
    monkeypatch.setitem(sys.modules, "wandb", there)
    with pytest.raises(RuntimeError, match=r"wandb\.project is given.*pip install wandb"):
        Recorder(tmp_path / "run", 10, wandb={"project": "p"})
    assert not (tmp_path / "run").exists()
    for unused in (None, {}, {"project": None, "offline": True}):
        record(tmp_path / "other", range(1, 2), wandb=unused)


class FakeWandb(types.ModuleType):
    """Keeps what W&B is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun, self.logged, self.ended, self.keys = [], [], [], []
        self.id = "abc123"

    def init(self, **settings) -> FakeWandb:
        self.begun.append(settings)
        return self

    def login(self, key: str) -> None:
        self.keys.append(key)

    def log(self, figures: dict, step: int) -> None:
        self.logged.append((step, figures))

    def finish(self, exit_code: int) -> None:
        self.ended.append(exit_code)


def test_wandb_is_told_and_goes_on_with_its_run(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    settings = {"project": "p", "run_name": "n", "offline": True, "key": "secret"}
    config = {"lr": 1, "wandb": settings}
    record(tmp_path, range(1, 3), wandb=settings, config=config)
    assert fake.logged[0] == (1, {"stage": "compressor", "loss": 1.0, "frames": 80})
    assert (fake.ended, fake.keys) == ([0], [])
    begun = fake.begun[0]
    assert begun["config"] == {"lr": 1}, "the key stays here"
    assert (begun["project"], begun["name"], begun["mode"]) == ("p", "n", "offline")
    assert begun["id"] is None and begun["dir"] == str(tmp_path)
    with pytest.raises(KeyError), Recorder(tmp_path, 9, 2, {"project": "p", "key": "secret"}):
        raise KeyError
    assert fake.keys == ["secret"] and fake.ended == [0, 1]
    begun = fake.begun[1]
    assert (begun["id"], begun["resume"], begun["mode"]) == ("abc123", "allow", "online")
    assert begun["name"] == tmp_path.name
    record(tmp_path, range(1, 2), wandb={"project": "p"})  # anew: another run
    assert fake.begun[2]["id"] is None


def test_what_a_person_is_told():
    figures = {"loss": 2.34567, "gate/0": 0.1, "gate/1": 0.2, "mass/0": 0.01, "mass/1": 0.02}
    told = status(figures | {"tokens_per_second": 12345.6, "eval/loss": 2.5, "lr": 1e-3})
    assert list(told.values()) == [
        "loss 2.346",
        "eval 2.5",
        "gate 15.0%",
        "mass 1.5%",
        "12,346 tokens/s",
    ]
    assert status({"error/3": 0.5, "error/4": 0.25}) == {"error": "error 0.375"}
    assert status({}) == {}


def test_lines_without_a_terminal(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Bar(total=100, first=40) as bar:
        for step in range(41, 101):
            now[0] += 1
            bar.update(step, "all", {"loss": float(step)} | ({"mass/1": 0.5} if step == 41 else {}))
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "all 41/100 loss 41 mass 50.0% 0:00:59 left"
    assert told[1] == "all 51/100 loss 51 mass 50.0% 0:00:49 left"
    assert told[-1] == "all 100/100 loss 100 mass 50.0% 0:00:00 left"
    assert len(told) == 7


def test_figures_keep_their_order_and_go_with_their_stage(capsys):
    with Bar(total=3, first=0) as bar:
        for step, stage, figures in [
            (1, "distil", {"tokens_per_second": 5.0, "error/1": 0.5}),
            (2, "memory", {"tokens_per_second": 6.0}),
            (3, "memory", {"loss": 2.0}),
        ]:
            bar.update(step, stage, figures)
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("distil 1/3 error 0.5 5 tokens/s")
    assert told[-1].startswith("memory 3/3 loss 2 6 tokens/s")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_bar_in_a_terminal():
    """A real terminal, 120 columns wide."""
    import pty

    code = (
        "from ttt_cache.training.bar import Bar\n"
        "with Bar(10, 0) as bar: bar.update(4, 'memory', {'loss': 1.5, 'gate/1': 0.25})"
    )
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.Popen(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 65536):
            seen += part
    except OSError:  # the other end is closed
        pass
    assert done.wait() == 0
    text = seen.decode()
    assert "memory" in text and "4/10" in text and "loss 1.5 gate 25.0%" in text
