"""The verdict on a memory, branch by branch, and the page that it stands on."""

from __future__ import annotations

import math

import pytest

from ttt_cache.training.monitor import Observed
from ttt_cache.training.summary import BEFORE, FULL, RESET, THIS_RUN, WINDOW, summarise, verdict

OPEN = {25: Observed(0.2, 0.05, 0.5), 31: Observed(0.3, 0.25, 0.75)}
CLOSED = {25: Observed(0.01, 0.004, 0.1), 31: Observed(0.01, 0.0099, 0.1)}


def arms(run: float, window: float | None = None, reset: float | None = None, **others: float):
    """Arms by their losses; text and audio are left out."""
    losses = {THIS_RUN: run, WINDOW: window, RESET: reset} | others
    return {name: {"loss": loss} for name, loss in losses.items() if loss is not None}


@pytest.mark.parametrize(
    ("losses", "observed", "begins", "next_"),
    [
        ((2.0, 2.2, 2.2), OPEN, "The memory is used.", None),
        ((2.0, 2.2, 2.2), {}, "The memory is used.", None),
        ((2.0, None, 2.2), OPEN, "The memory is used.", None),
        ((2.0, 2.005, 2.2), OPEN, "The memory is used.", None),
        ((2.0, 2.2, 2.2), CLOSED, "The memory is used, although little attention", None),
        ((2.0, 2.2, 2.0), OPEN, "The memory is not used: there is no gain over a memory that", 1),
        ((2.0, 2.2, 2.009), CLOSED, "The memory is not used: there is no gain over a memory", 1),
        ((2.0, 2.0, 2.0), OPEN, "The memory is not used: the loss is the same without it.", 1),
        ((2.0, 1.991, 2.009), OPEN, "The memory is not used: the loss is the same", 1),
        ((2.0, 2.0, None), OPEN, "The memory is not used: the loss is the same", 1),
        ((2.0, 2.0, 2.0), CLOSED, "The memory is not used: hardly any attention goes to it.", 1),
        ((2.0, 2.2, None), CLOSED, "The memory is not used: hardly any attention goes to it.", 1),
        ((2.0, None, None), CLOSED, "The memory is not used: hardly any attention goes to it.", 1),
        ((2.0, 1.9, 1.9), OPEN, "The memory is harmful: without it the loss is lower.", 2),
        ((2.0, 2.2, 1.9), OPEN, "The memory is harmful: without it the loss is lower.", 2),
        ((2.0, 1.9, None), CLOSED, "The memory is harmful: without it the loss is lower.", 2),
        ((2.0, 1.9, 2.2), OPEN, "The memory is harmful: the trained weights rely on it", 2),
        ((2.0, 2.2, None), OPEN, "The loss is lower than the window's, but whether", None),
        ((2.0, None, None), OPEN, "It cannot be told whether the memory is used: there is", None),
        ((math.nan, 2.2, 2.2), OPEN, "Failed: the loss of this run is not finite.", None),
    ],
)
def test_every_verdict(losses, observed, begins, next_):
    said = verdict(arms(*losses), observed)
    assert said.startswith(begins)
    unused = ("longer sequences", "higher learning rate", "distil", "gate that starts more open")
    harmful = ("distil the memory first", "lower learning rate", "gate that starts more closed")
    assert all(word in said for word in unused) == (next_ == 1)
    assert all(word in said for word in harmful) == (next_ == 2)
    assert ("preset random" in said) == begins.startswith("The memory is used")
    assert "\n" not in said and "  " not in said


def test_the_numbers_behind_it():
    losses = arms(2.0, 2.5, 2.2, **{FULL: 1.9})
    losses[THIS_RUN] |= {"text_loss": 0.5, "audio_loss": 1.5}
    losses[RESET] |= {"text_loss": 1.0, "audio_loss": 1.2}
    said = verdict(losses, OPEN)
    assert "The loss, 2, is 20.0% below window only (2.5)." in said
    assert "The loss, 2, is 9.1% below memory reset (2.2)." in said
    assert "Beside memory reset, text alone is -50.0%, audio alone +25.0%." in said
    assert "Of attention, 5.0% to 25.0% goes to the memory, the most in layer 31." in said
    assert "Of what full context (1.9) gains over the window, it has 83%." in said
    said = verdict(arms(2.0, 2.005, 1.5), CLOSED)
    assert "The loss, 2, is within 0.5% of window only (2.005)." in said
    assert "The loss, 2, is 33.3% above memory reset (1.5)." in said
    assert "Less than 1% of attention goes to the memory in every layer, the most in layer" in said
    assert "31 (0.99%)" in said
    said = verdict(arms(2.0, math.inf), {})
    assert "There is no finite loss of window only and memory reset to compare with." in said
    assert "No layer was observed." in said


def test_a_task_that_needs_no_memory():
    said = verdict(arms(2.0, 2.0, 2.0, **{FULL: 1.995}), OPEN)
    assert "there is next to nothing for a memory to gain" in said


def test_one_open_layer_is_enough():
    said = verdict(arms(2.0, 2.0, 2.0), CLOSED | {3: Observed(0.1, 0.01, 0.1)})
    assert "the loss is the same without it" in said


def test_this_run_must_be_there():
    with pytest.raises(ValueError, match="arms must have 'this run', got \\['window only'\\]"):
        verdict({WINDOW: {"loss": 1.0}}, OPEN)


def test_the_page(tmp_path, capsys):
    losses = arms(2.0, 2.5, 2.2, **{FULL: 1.9, BEFORE: math.nan})
    losses[THIS_RUN] |= {"text_loss": 0.5, "audio_loss": 1.5}
    facts = {"config": "a|b", "device": "cpu"}
    path = summarise(tmp_path, losses, OPEN, facts)
    page = path.read_text()
    assert path == tmp_path / "summary.md"
    assert page.startswith(f"# Training run {tmp_path.name}\n\nThe memory is used.")
    assert "| this run | 2.0000 | 0.5000 | 1.5000 | -0.5000 (-20.0%) |" in page
    assert "| window only | 2.5000 |  |  |  |" in page
    assert "| memory reset | 2.2000 |  |  | -0.3000 (-12.0%) |" in page
    assert "| before training | nan |  |  | unknown |" in page
    assert "| 31 | 30.0% | 25.0% | 0.75 |" in page
    assert "| config | a\\|b |" in page and "training.png" not in page
    order = [page.index(f"| {name} |") for name in (THIS_RUN, WINDOW, RESET, FULL, BEFORE)]
    assert order == sorted(order)
    printed = " ".join(capsys.readouterr().out.split())
    assert verdict(losses, OPEN) in printed and "-0.5000 (-20.0%)" in printed
    assert "summary.md" in printed


def test_many_layers_fit_on_one_page(tmp_path):
    (tmp_path / "training.png").touch()
    observed = {n: Observed(n / 100, (31 - n) / 100, n / 4) for n in range(32)}
    page = summarise(tmp_path, arms(2.0, 2.2, 2.2), observed, {}).read_text()
    assert "| least | 0.0% (0) | 0.0% (31) | 0 (0) |" in page
    assert "| median | 16.0% (16) | 16.0% (15) | 4 (16) |" in page
    assert "| most | 31.0% (31) | 31.0% (0) | 7.75 (31) |" in page
    assert "](training.png)" in page and len(page.splitlines()) < 40


def test_no_controls_and_nothing_observed(tmp_path):
    page = summarise(tmp_path, arms(2.0), {}, {}).read_text()
    assert "| this run | 2.0000 |  |  |  |" in page and "layer by layer" not in page


def test_a_full_disk_leaves_the_old_page(tmp_path, monkeypatch):
    path = summarise(tmp_path, arms(2.0, 2.2), OPEN, {})
    old = path.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        summarise(tmp_path, arms(1.0, 2.2), OPEN, {})
    assert path.read_text() == old and [p.name for p in tmp_path.iterdir()] == ["summary.md"]
