"""Free runs: LMGen is stepped as in training."""

from __future__ import annotations

import json

import pytest
import torch
from evaluation_support import habits_of
from models import SMALL, random_codes, stir, tiny_lm
from moshi.models.lm import LMGen

import ttt_cache
from ttt_cache.evaluation.freerun import divergence, freerun
from ttt_cache.evaluation.generation import generate
from ttt_cache.evaluation.source import Piece

PADDING = 3
GREEDY = {"use_sampling": False}


class Recording:
    """A source of random conversations, as long as asked or as long as it is."""

    name = "recording"

    def __init__(self, model, length: int | None = None, piece: int = 7) -> None:
        self.model, self.length, self.piece = model, length, piece

    def codes(self, rows: int, frames: int, seed: int):
        return random_codes(self.model, self.length or frames, rows, seed)

    def pieces(self, rows, frames, seed):
        for part in self.codes(rows, frames, seed).split(self.piece, dim=2):
            yield Piece(part, {})


@torch.no_grad()
def test_frames_are_those_of_training():
    """Greedy, the next frame is what `forward` finds likeliest after the same frames."""
    model = tiny_lm()
    heard = random_codes(model, 24, batch=2)[:, 3:]
    said = torch.cat([g.codes for g in generate(model, heard.split(5, 2), 2, 0, GREEDY)], dim=2)
    assert said.shape == (2, 3, 23)  # the last frame waits for its delayed codebook
    codes = torch.cat([said, heard[:, :, :23]], dim=1)
    out = model(codes)
    known = ~out.text_logits[:, 0].isnan().any(-1)
    assert torch.equal(out.text_logits[:, 0].argmax(-1)[known], said[:, 0][known])
    for k in range(2):
        known = out.mask[:, k]
        assert torch.equal(out.logits[:, k].argmax(-1)[known], said[:, 1 + k][known])


def test_the_run_is_lmgens():
    """Sampling and all, whatever the pieces; and the caller's random numbers are left alone."""
    model = tiny_lm()
    heard = random_codes(model, 30, batch=1)[:, 3:]
    torch.manual_seed(5)
    state, expected = torch.get_rng_state(), []
    generator = LMGen(model)
    ahead = torch.cat([torch.zeros_like(heard[:, :, :1]), heard[:, :, :-1]], dim=2)
    with generator.streaming(1):
        for frame in ahead.split(1, dim=2):
            if (codes := generator.step(frame)) is not None:
                expected.append(codes)
    torch.set_rng_state(state)
    for size in (30, 4):
        pieces = []
        for generated in generate(model, heard.split(size, 2), 1, 5):
            pieces.append(generated.codes)
            torch.rand(3)
        assert torch.equal(torch.cat(pieces, 2), torch.cat(expected, 2))
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.rand(3 * (1 + 8))
    torch.set_rng_state(state)
    for _ in range(1 + 8):
        torch.rand(3)
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("layers", [None, [0, 2], "stock"])
def test_a_run_of_any_model(layers):
    model = tiny_lm()
    if layers != "stock":
        ttt_cache.patch(model, layers=layers, **SMALL)
        stir(model)
    source = Recording(model)
    run = freerun(model, source, 100, 3, rows=2, window=40)
    assert json.loads(json.dumps(run, allow_nan=False)) == run
    assert [w["start"] for w in run["windows"]] == [0, 0, 40, 40, 80, 80]
    assert run["state_bytes"]["start"] == run["state_bytes"]["end"] == run["state_bytes"]["most"]
    assert 0 < run["step_ms"]["p50"] <= run["step_ms"]["p99"]
    recorded = habits_of(model, source.codes(2, 101, 3)[:, :3, :100], 40, 100)
    assert run["recorded"] == recorded
    again = freerun(model, source, 100, 3, rows=2, window=40)
    assert again["windows"] == run["windows"]
    assert freerun(model, source, 100, 4, rows=2, window=40)["windows"] != run["windows"]
    assert not model.transformer.is_streaming


def test_settings_reach_lmgen():
    model = tiny_lm()
    runs = [freerun(model, Recording(model), 50, 0, settings=GREEDY) for _ in range(2)]
    sampled = freerun(model, Recording(model), 50, 0)
    assert runs[0]["windows"] == runs[1]["windows"] != sampled["windows"]


def test_a_model_that_only_listens():
    """Speech to text: no depformer, all codebooks are the user's."""
    model = tiny_lm(dep_q=0, n_q=2, delays=[0, 0, 0])
    run = freerun(model, Recording(model), 40, 0, window=20)
    assert [w.keys() & {"said", "voice"} for w in run["windows"]] == [{"said"}] * 2
    assert divergence(run, run) == {"said": {"1": 0.0, "2": 0.0}}


def test_refusals():
    model = tiny_lm()
    source = Recording(model)
    for name in ("frames", "rows", "window"):
        given = {"frames": 5, "rows": 1, "window": 5, name: 0}
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            freerun(model, source, seed=0, **given)
    with pytest.raises(ValueError, match="recording must have 101 frames"):
        freerun(model, Recording(model, length=60), 100, 0)
    with pytest.raises(ValueError, match="n_q = dep_q = 2"):
        freerun(tiny_lm(n_q=2, delays=[0, 0, 1]), source, 5, 0)
    with pytest.raises(ValueError, match="eval mode"):
        freerun(tiny_lm().train(), source, 5, 0)
    with pytest.raises(ValueError, match=r"shape \[2, 2, S\].*got \[1, 2, 4\]"):
        next(generate(model, [torch.zeros(1, 2, 4, dtype=torch.long)], 2, 0))
    with pytest.raises(ValueError, match="at most 30, the model's card, got 31"):
        next(generate(model, [torch.full((2, 2, 4), 31)], 2, 0))
    assert not model.is_streaming
    with model.streaming(1), pytest.raises(RuntimeError, match="run freely while it is streaming"):
        freerun(model, source, 5, 0)
