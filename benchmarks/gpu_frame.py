"""Whole frames of a randomly initialised Moshi, through its own generator: stock and patched.

A frame is `LMGen.step`: embeddings, temporal transformer, sampling and depformer, captured by
Moshi itself, with the wall clock around it until the GPU is done, as a conversation sees it.
Weights alone are many times the L2 cache: it is cold without anybody's doing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from moshi.models.lm import LMGen, LMModel
from moshi.models.loaders import get_moshi_lm
from moshi.modules.streaming import StreamingModule

import ttt_cache
from ttt_cache.bench.core import fill_ring
from ttt_cache.patched import PatchedState

REAL_TIME_MS = 80.0


class Frames:
    """Conversations of one model, their rings full and their memories written.

    Args:
        filled: frames that a patched model is stepped through first, more than its window.
    """

    def __init__(self, lm: LMModel, batch: int, filled: int) -> None:
        self.gen = LMGen(lm)
        self.gen.streaming_forever(batch)
        heard = lm.num_codebooks - lm.dep_q - 1
        self.codes = torch.randint(0, lm.card, (batch, heard, 1), device=lm.device)
        self.wait = torch.cuda.synchronize if lm.device.type == "cuda" else lambda: None
        rings = 0
        for layer in lm.transformer.layers:  # type: ignore[union-attr]
            state: Any = layer.self_attn._streaming_state  # type: ignore[union-attr]
            if not isinstance(state, PatchedState):
                fill_ring(state)
                rings += 1
        # What is captured, is captured in the first steps.
        for _ in range(3 if rings == len(lm.transformer.layers) else filled):
            self.step()

    def step(self) -> float:
        """Milliseconds of a frame of all conversations."""
        began = time.perf_counter_ns()
        self.gen.step(self.codes)
        self.wait()
        return (time.perf_counter_ns() - began) / 1e6


def end(model: torch.nn.Module) -> None:
    """End a model's conversations, also those that did not come to begin for want of room."""
    for module in model.modules():
        if isinstance(module, StreamingModule):
            module._streaming_state = None


def measure(
    models: Mapping[str, LMModel], batch: int, chunk: int, repetitions: int, filled: int
) -> dict[str, dict[str, Any]]:
    """Frames of all models at one batch size, in turns of a whole chunk.

    Returns:
        for each `p50`, `p99` and, over whole chunks, `mean` in ms, and how many `frames`; nothing
        if they do not fit.
    """
    names, spent = list(models), {name: list[float]() for name in models}
    try:
        running = {name: Frames(lm, batch, filled) for name, lm in models.items()}
        for turn in range(repetitions):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                spent[name] += [running[name].step() for _ in range(chunk)]
    except torch.cuda.OutOfMemoryError:
        return {}
    finally:
        for lm in models.values():
            end(lm)
    return {name: summary(ms) for name, ms in spent.items()}


def summary(ms: list[float]) -> dict[str, Any]:
    return {
        "p50": float(np.percentile(ms, 50)),
        "p99": float(np.percentile(ms, 99)),
        "mean": float(np.mean(ms)),
        "frames": len(ms),
    }


def models(
    device: torch.device, dtype: torch.dtype, settings: dict[str, Any], **sizes: Any
) -> dict[str, LMModel]:
    """A Moshi at random, and a patched one on the same weights; `sizes` differ from Moshi 7B's."""
    stock = get_moshi_lm(None, device=device, dtype=dtype, lm_kwargs_overrides=sizes)
    patched = get_moshi_lm(None, device="meta", dtype=dtype, lm_kwargs_overrides=sizes)
    patched.load_state_dict(stock.state_dict(), assign=True)
    patched = patched.eval()
    ttt_cache.patch(patched, **settings)
    return {"stock": stock.eval(), "patched": patched}


def in_real_time(frames: Mapping[int, Mapping[str, Any]]) -> int:
    """Of the batch sizes measured, the largest whose p99 is within a frame's 80 ms."""
    return max((n for n, one in frames.items() if one["p99"] < REAL_TIME_MS), default=0)
