"""The picture of a training run shows what the metrics file says, and says what is not there."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from ttt_cache.training.curves import Curve, read_run, smoothed
from ttt_cache.training.metrics import append
from ttt_cache.training.picture import draw

STAGES = ["distil", "compressor", "layers"]


def record(folder: Path, layers: range, steps: int = 12) -> Path:
    """A run of three stages of four steps each, or as many as there are steps for."""
    path = folder / "metrics.jsonl"
    path.touch()
    for step in range(1, steps + 1):
        stage = STAGES[(step - 1) // 4]
        figures = {f"{name}/{layer}": 0.1 for layer in layers for name in ("gate", "mass", "ratio")}
        if stage == "distil":
            figures |= {f"error/{layer}": 0.05 * step for layer in layers}
        else:
            figures |= {"loss": 30.0 / step, "text_loss": 1.0, "audio_loss": 2.0}
        append(path, step, stage, figures)
        if step % 4 == 0:
            append(path, step, stage, {"eval/loss": 2.0})
    return path


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    saved, save = [], Figure.savefig

    def keep(self, *args, **settings):
        saved.append(self)
        return save(self, *args, **settings)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_a_whole_run(tmp_path, figures):
    record(tmp_path, range(32))
    path = draw(tmp_path)
    assert path == tmp_path / "training.png" and path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    losses, gate, ratio, mass, bar = figures[0].axes
    labels = losses.get_legend_handles_labels()[1]
    assert labels == ["total", "text", "audio", "evaluated", "error of each layer (distillation)"]
    assert losses.get_yscale() == "log"  # 0.05 to 6
    assert texts(losses) == STAGES and bar.get_ylabel().startswith("layer")
    for axes in (gate, ratio, mass):
        curves = [line for line in axes.lines if len(line.get_xdata()) == 12]
        assert len(curves) == 32 and len({line.get_color() for line in curves}) == 32
        marks = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]
        assert marks == [0, 4, 8]
        assert axes.get_ylim() == (0, pytest.approx(0.11))
    assert any("shut out" in text for text in texts(mass))


def test_one_layer_needs_no_colour_bar(tmp_path, figures):
    record(tmp_path, range(25, 26), steps=4)
    draw(tmp_path)
    losses, gate, *_ = figures[0].axes
    assert len(figures[0].axes) == 4 and len(gate.lines) == 1
    assert texts(losses) == [], "one stage needs no mark"


def test_missing_panels_say_why(tmp_path, figures):
    (tmp_path / "metrics.jsonl").touch()
    draw(tmp_path)
    record(tmp_path, range(0), steps=4)
    draw(tmp_path)
    for axes in figures[0].axes:
        assert texts(axes)[0].endswith("as there are no steps")
    losses, *others = figures[1].axes
    for axes in others:
        assert texts(axes) == ["the memory was not observed in any of the 4 steps"]
    assert [line.get_label() for line in losses.lines] == ["evaluated"]


def test_losses_that_are_not_finite(tmp_path, figures):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        append(path, step, "memory", {"loss": math.nan, "mass/1": math.inf})
    draw(tmp_path)
    assert texts(figures[0].axes[0]) == ["no finite loss was recorded in any of the 2 steps"]
    append(path, 3, "memory", {"loss": 2.0, "mass/1": 0.5})
    draw(tmp_path)
    losses, *_, mass = figures[1].axes
    assert np.array_equal(losses.lines[0].get_ydata(), [np.nan, np.nan, 2.0], equal_nan=True)
    assert mass.get_ylim() == (0, pytest.approx(0.55))


def test_a_failed_drawing_leaves_the_old_one(tmp_path, monkeypatch):
    record(tmp_path, range(2))
    old = draw(tmp_path).read_bytes()

    def full(self, path, **settings):
        Path(path).write_bytes(old[:100])
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        draw(tmp_path)
    assert (tmp_path / "training.png").read_bytes() == old
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "training.png"}


def test_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        draw(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("hello\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: must be a JSON object"):
        draw(tmp_path)


def test_curves_and_stages(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append(path, 0, "distil", {"eval/loss": 3.0})
    append(path, 5, "distil", {"error/10": 0.5, "error/9": math.nan, "lr": 0.1})
    append(path, 8, "memory", {"error/10": 0.25, "mass/31": 0.125})
    run = read_run(path)
    assert (run.stages, run.last) == ([(0, "distil"), (5, "memory")], 8)
    assert list(run.layers("error")) == [9, 10]
    assert [values.tolist() for values in run.layers("error")[10]] == [[5, 8], [0.5, 0.25]]
    assert math.isnan(run.layers("error")[9].values[0])
    assert run.depths(["error", "mass", "gate"]) == [9, 10, 31]
    assert run.layers("eval/loss") == {}


def test_long_curves_are_means_of_neighbours():
    few = Curve(np.arange(119.0), np.arange(119.0))
    assert smoothed(few) is few
    many = smoothed(Curve(np.arange(600.0), np.tile([0.0, 1.0], 300)))
    assert many.steps.tolist() == [10 * i + 4.5 for i in range(60)]
    assert many.values.tolist() == [0.5] * 60
