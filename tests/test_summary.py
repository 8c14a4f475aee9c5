"""The verdict on a memory, branch by branch, and the page that it stands on."""

from __future__ import annotations

import math

import pytest

from ttt_cache.config import CacheConfig
from ttt_cache.training.monitor import Observed
from ttt_cache.training.result import BEFORE, FULL, RESET, THIS_RUN, WINDOW, Result
from ttt_cache.training.summary import summarise
from ttt_cache.training.verdict import verdict

OPEN = {25: Observed(0.2, 0.05, 0.5), 31: Observed(0.3, 0.25, 0.75)}
CLOSED = {25: Observed(0.01, 0.004, 0.1), 31: Observed(0.01, 0.0099, 0.1)}


def arms(run: float, window: float | None = None, reset: float | None = None, **others: float):
    """Arms by their losses; text and audio are left out."""
    losses = {THIS_RUN: run, WINDOW: window, RESET: reset} | others
    return {name: {"loss": loss} for name, loss in losses.items() if loss is not None}


def result(losses, observed=OPEN, stages=("compressor",), from_adapter=False, **patch) -> Result:
    return Result(losses, observed, CacheConfig(**patch), stages, from_adapter)


@pytest.mark.parametrize(
    ("losses", "observed", "begins", "next_"),
    [
        ((2.0, 2.2, 2.2), OPEN, "The memory is used. The loss, 2, is", "preset random"),
        ((2.0, 2.2, 2.2), {}, "The memory is used.", "preset random"),
        ((2.0, 2.005, 2.2), OPEN, "The memory is used.", "preset random"),
        ((2.0, math.nan, 2.2), OPEN, "The memory is used.", "preset random"),
        ((2.0, 2.2, 2.2), CLOSED, "The memory is used, although little attention", "random"),
        ((2.0, 1.9, 2.2), OPEN, "The memory is used, but a plain window of as", "smaller chunk"),
        ((2.0, 2.2, 2.0), OPEN, "The memory is not used: the loss is the same", "longer seq"),
        ((2.0, 1.9, 2.0), OPEN, "The memory is not used: the loss is the same", "longer seq"),
        ((2.0, 2.2, 2.009), OPEN, "The memory is not used: the loss is the same", "longer seq"),
        ((2.0, 2.2, 2.009), CLOSED, "The memory is not used: hardly any attention", "longer seq"),
        ((2.0, 1.9, 1.9), OPEN, "The memory is harmful: without it the loss", "lower learning"),
        ((2.0, 2.2, 1.9), OPEN, "The memory is harmful: without it the loss", "lower learning"),
        ((2.0, 1.9, 1.9), CLOSED, "The memory is harmful: without it the loss", "lower learning"),
        ((2.0, 2.2, math.inf), OPEN, "It cannot be told whether the memory is used.", None),
        ((math.nan, 2.2, 2.2), OPEN, "Failed: the loss of this run is not finite.", "lower learn"),
    ],
)
def test_every_verdict(losses, observed, begins, next_):
    said = verdict(result(arms(*losses), observed))
    assert said.startswith(begins)
    advice = ("preset random", "smaller chunk", "longer sequences", "lower learning rate")
    for each in advice:
        assert (each in said) == (next_ is not None and next_ in each), each
    assert "\n" not in said and "  " not in said


def test_without_held_out_recordings_it_says_what_was_seen():
    said = verdict(result({}))
    assert said.startswith("It cannot be told whether the memory helps: there is no eval_data.")
    assert "Of attention, 5.0% to 25.0% goes to the memory" in said and "not used" not in said
    said = verdict(result({}, CLOSED))
    assert said.startswith("The memory is not used: hardly any attention goes to it. Less than 1%")
    assert "there is no eval_data" in said and "longer sequences" in said


@pytest.mark.parametrize(
    ("patch", "begins"),
    [
        ({"preset": "window"}, "There is no memory to judge: the patch is a window."),
        ({"preset": "ttt-mlp-layer"}, "It cannot be told whether the memory is used: a layer"),
        (
            {"preset": "ttt-window", "write": "arrived", "recent": {0: 0, 1: 8}},
            "It cannot be told whether the memory is used: a layer",
        ),
    ],
)
def test_where_no_control_leaves_the_memory_out(patch, begins):
    said = verdict(result(arms(2.0, **{FULL: 1.9, BEFORE: 2.5}), {0: Observed(0, 0, 0)}, **patch))
    assert said.startswith(begins) and "attention" not in said and "to try" not in said
    assert said.endswith("The loss is 2; before training: 2.5; full context: 1.9.")
    assert verdict(result({}, **patch)).endswith("There is no eval_data to judge it on.")


def test_a_memory_that_learns_nothing_is_not_compared_with_a_random_one():
    said = verdict(result(arms(2.0, 2.2, 2.2), preset="cluster"))
    assert said.startswith("The memory is used.") and "random" not in said


@pytest.mark.parametrize("losses", [(2.0, 2.0, 2.0), (2.0, 1.9, 1.9)])
def test_advice_is_what_was_not_done(losses):
    def advice(*stages, **more):
        return verdict(result(arms(*losses), stages=stages, **more))

    assert "distilling it first" in advice("compressor", "layers")
    assert "distil" not in advice("distill", "compressor")
    assert "distil" not in advice("compressor", from_adapter=True)
    assert "training it on Moshi's loss after distillation" in advice("distill")


def test_the_numbers_behind_it():
    losses = arms(2.0, 2.5, 2.2, **{FULL: 1.9})
    losses[THIS_RUN] |= {"text_loss": 0.5, "audio_loss": 1.5}
    losses[RESET] |= {"text_loss": 1.0, "audio_loss": 1.2}
    said = verdict(result(losses))
    assert "The loss, 2, is 20.0% below window only (2.5)." in said
    assert "The loss, 2, is 9.1% below memory reset (2.2)." in said
    assert "Beside memory reset, text alone is -50.0%, audio alone +25.0%." in said
    assert "Of attention, 5.0% to 25.0% goes to the memory, the most in layer 31." in said
    assert "Of what full context (1.9) gains over the window, it has 83%." in said
    said = verdict(result(arms(2.0, 2.005, 1.5), CLOSED))
    assert "The loss, 2, is within 0.5% of window only (2.005)." in said
    assert "The loss, 2, is 33.3% above memory reset (1.5)." in said
    assert "Less than 1% of attention goes to the memory in every layer, the most in layer" in said
    assert "31 (0.99%)" in said
    said = verdict(result(arms(2.0, math.inf), {}))
    assert "There is no finite loss of window only to compare with." in said
    assert "There is no finite loss of memory reset to compare with." in said
    assert "No layer was observed." in said


def test_a_task_that_needs_no_memory():
    said = verdict(result(arms(2.0, 2.0, 2.0, **{FULL: 1.995})))
    assert "there is next to nothing for a memory to gain" in said
    said = verdict(result(arms(2.0, 2.5, 2.5, **{FULL: 2.6})))
    assert "nothing for a memory to gain" not in said
    assert "Full context (2.6) gains less than 0.5% over the window here, unlike this run." in said


def test_a_moshi_that_was_trained_along_is_no_fair_window():
    for stages, along in ((("distill", "compressor"), False), (("compressor", "layers"), True)):
        said = verdict(result(arms(2.0, 2.5, 2.5), stages=stages))
        assert ("Moshi was trained along" in said) == along


def test_one_open_layer_is_enough():
    said = verdict(result(arms(2.0, 2.0, 2.0), CLOSED | {3: Observed(0.1, 0.01, 0.1)}))
    assert "the loss is the same without it" in said


def test_this_run_must_be_there():
    with pytest.raises(ValueError, match="arms must have 'this run', got \\['window only'\\]"):
        result({WINDOW: {"loss": 1.0}})


def test_the_page(tmp_path, capsys):
    losses = arms(2.0, 2.5, 2.2, **{FULL: 1.9, BEFORE: math.nan})
    losses[THIS_RUN] |= {"text_loss": 0.5, "audio_loss": 1.5}
    facts = {"config": "a|b", "device": "cpu"}
    path = summarise(tmp_path, result(losses), facts)
    page = path.read_text()
    assert path == tmp_path / "summary.md"
    assert page.startswith(f"# Training run {tmp_path.name}\n\nThe memory is used.")
    assert "| this run | 2.0000 | 0.5000 | 1.5000 | -0.5000 (-20.0%) |" in page
    assert "| window only | 2.5000 |  |  |  |" in page
    assert "| memory reset | 2.2000 |  |  | -0.3000 (-12.0%) |" in page
    assert "| before training | nan |  |  | unknown |" in page
    assert "`window only` sees as many frames" in page
    assert "| 31 | 30.0% | 25.0% | 0.75 |" in page
    assert "| config | a\\|b |" in page and "training.png" not in page
    order = [page.index(f"| {name} |") for name in (THIS_RUN, WINDOW, RESET, FULL, BEFORE)]
    assert order == sorted(order)
    printed = " ".join(capsys.readouterr().out.split())
    assert verdict(result(losses)) in printed and "-0.5000 (-20.0%)" in printed
    assert "summary.md" in printed


def test_many_layers_fit_on_one_page(tmp_path):
    (tmp_path / "training.png").touch()
    observed = {n: Observed(n / 100, (31 - n) / 100, n / 4) for n in range(32)}
    page = summarise(tmp_path, result(arms(2.0, 2.2, 2.2), observed), {}).read_text()
    assert "| least | 0.0% (0) | 0.0% (31) | 0 (0) |" in page
    assert "| median | 16.0% (16) | 16.0% (15) | 4 (16) |" in page
    assert "| most | 31.0% (31) | 31.0% (0) | 7.75 (31) |" in page
    assert "](training.png)" in page and len(page.splitlines()) < 40


def test_a_page_without_controls_and_one_without_losses(tmp_path, capsys):
    page = summarise(tmp_path, result(arms(2.0), {}, preset="window"), {}).read_text()
    assert "| this run | 2.0000 |  |  |\n" in page and "layer by layer" not in page
    assert "window only" not in page
    capsys.readouterr()
    page = summarise(tmp_path, result({}), {}).read_text()
    assert "Mean losses" not in page and "layer by layer" in page
    assert "no eval_data" in page and "text loss" not in capsys.readouterr().out


def test_a_full_disk_leaves_the_old_page(tmp_path, monkeypatch):
    path = summarise(tmp_path, result(arms(2.0, 2.2)), {})
    old = path.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        summarise(tmp_path, result(arms(1.0, 2.2)), {})
    assert path.read_text() == old and [p.name for p in tmp_path.iterdir()] == ["summary.md"]
