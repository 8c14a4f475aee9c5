"""`benchmarks/serve_gpu.py` on the CPU and small: its servers, and when an arm ends."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ttt_cache.patched import PatchedAttention

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import serve_gpu

    return serve_gpu


def test_each_level_is_a_server_of_its_own_until_one_is_not_held(script, monkeypatch) -> None:
    models = script.Models.at_random(torch.device("cpu"), torch.float32, small=True)
    stock, patched = models.arms["stock"], models.arms["patched"]
    layers = [lm.transformer.layers[0].self_attn for lm in (stock, patched)]
    assert [isinstance(each, PatchedAttention) for each in layers] == [False, True]
    assert stock.emb[0].weight.data_ptr() == patched.emb[0].weight.data_ptr()
    served: list[int] = []

    def measure(server: Any, options: argparse.Namespace) -> dict[str, Any]:
        engine = server.engine
        noise = np.random.default_rng(0).normal(0, 0.1, engine.frame_size).astype(np.float32)
        rows = [engine.join() for _ in range(engine.rows)]
        answers = [engine.step(dict.fromkeys(rows, noise)) for _ in range(4)][-1]
        assert all(np.abs(answers[row].pcm).max() > 0 for row in rows), "it speaks"
        assert server.sockets[0].getsockname()[1] == server.options.port
        server.sockets[0].close()
        server.thread.shutdown()
        served.append(len(rows))
        return {"clients": len(rows), "held": len(rows) < 2, "reasons": [], "p99_ms": 9.0}

    monkeypatch.setattr(script, "measure", measure)
    asked = argparse.Namespace(clients=[1, 2, 3])
    found = {arm: list(script.levels(models, arm, asked, math.inf)) for arm in models.arms}
    assert served == [1, 2] * 2
    assert not list(script.levels(models, "stock", asked, -math.inf)), "no time is left"
    lines = {line.name: line.value for line in script.lines_of(found)}
    assert lines["patched: conversations in real time"] == 1 and lines["stock: p99 of 2"] == 9.0
