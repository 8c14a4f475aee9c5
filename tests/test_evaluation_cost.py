"""What a frame costs: bytes as `report` lays them out, and times of the steps that were asked."""

from __future__ import annotations

import json

import numpy as np
import pytest
from models import SMALL, tiny_lm
from moshi.models.lm import LMGen

import ttt_cache
from ttt_cache.evaluation import cost as module
from ttt_cache.evaluation.cost import cost
from ttt_cache.evaluation.generation import milliseconds


@pytest.mark.parametrize("rows", [1, 3])
def test_bytes_are_those_of_the_report(rows):
    """But for what a transformer, and a stock ring, hold beside: offsets and exec masks."""
    model = tiny_lm()
    stock = cost(model, rows=rows, frames=3)
    assert json.loads(json.dumps(stock)) == stock
    with ttt_cache.patch(model, **SMALL):
        patched = cost(model, rows=rows, frames=3)
        report = ttt_cache.report(model, rows)
    for measured, laid_out in (
        (stock["state_bytes"], report.stock_bytes),
        (patched["state_bytes"], report.patched_bytes),
    ):
        assert 0 <= measured - laid_out <= 64 * rows


def test_steps_are_counted_and_the_first_ones_not_timed(monkeypatch):
    model, steps, timed = tiny_lm(), [], []
    step, summarised = LMGen.step, module.milliseconds

    def counted(self, codes):
        steps.append(codes.shape[0])
        return step(self, codes)

    def seen(seconds):
        timed.append(len(seconds))
        return summarised(seconds)

    monkeypatch.setattr(LMGen, "step", counted)
    monkeypatch.setattr(module, "milliseconds", seen)
    found = cost(model, rows=2, frames=5)
    assert steps == [2] * (module.WARM + 5) and timed == [5]
    assert 0 < found["step_ms"]["p50"] <= found["step_ms"]["p99"]
    assert (found["rows"], found["frames"], found["device"]) == (2, 5, "cpu")


def test_quantiles():
    seconds = np.arange(101)[::-1] / 1000
    assert milliseconds(seconds) == {"p50": pytest.approx(50), "p99": pytest.approx(99)}


def test_a_model_that_only_listens():
    found = cost(tiny_lm(dep_q=0, n_q=2, delays=[0, 0, 0]), frames=2)
    assert found["state_bytes"] > 0


def test_refusals():
    model = tiny_lm()
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        cost(model, rows=0)
    with pytest.raises(ValueError, match="frames must be at least 1, got 0"):
        cost(model, frames=0)
    with model.streaming(1), pytest.raises(RuntimeError, match="streaming"):
        cost(model)
    with pytest.raises(ValueError, match="eval mode"):
        cost(tiny_lm().train())
