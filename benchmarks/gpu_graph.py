"""Whether a captured step is the step: masks, resets, restored states, and one capture only."""

from __future__ import annotations

from typing import Any

import torch
from core import worst
from moshi.models.lm import LMModel
from moshi.utils.compile import CUDAGraphed
from torch import Tensor

import ttt_cache
from ttt_cache.bench.check import off
from ttt_cache.bench.core import stir
from ttt_cache.state import CacheState

ROWS = 4


class Streamed:
    """A patched model, streaming; its step captured as Moshi's own generator captures it."""

    def __init__(self, lm: LMModel, captured: bool) -> None:
        self.lm = lm
        lm.streaming_forever(ROWS)
        self.step = CUDAGraphed(lm.forward_text, disable=not captured)

    @property
    def states(self) -> list[CacheState]:
        layers: Any = self.lm.transformer.layers
        return [layer.self_attn._streaming_state.cache for layer in layers]

    @torch.no_grad()
    def logits(self, codes: Tensor, mask: Tensor) -> Tensor:
        self.lm.set_exec_mask(mask)
        return self.step(codes)[1].clone()

    def restore(self, kept: list[CacheState]) -> None:
        """Put a state back in place: a captured step goes on with the tensors that it knows."""
        everyone = torch.ones(ROWS, dtype=torch.bool, device=self.lm.device)
        for mine, old in zip(self.states, kept, strict=True):
            mine.commit(old, everyone)


def captured_is_eager(eager: LMModel, captured: LMModel, steps: int) -> tuple[float, bool]:
    """Step two models of the same weights side by side, one of them as a CUDA graph.

    Rows fall out of step under exec masks, one is reset half way, and after three quarters both
    go back to the state of the first quarter.

    Args:
        steps: several windows long.

    Returns:
        the largest difference, as a share of the scale, and whether nothing was captured again.
    """
    device = eager.device
    plain, graphed = Streamed(eager, False), Streamed(captured, device.type == "cuda")
    kept, graphs, figures = [], set(), [0.0]
    for step in range(steps):
        codes = torch.randint(0, eager.card, (ROWS, eager.num_codebooks, 1), device=device)
        mask = torch.rand(ROWS, device=device) < 0.8
        one, other = plain.logits(codes, mask), graphed.logits(codes, mask)
        if mask.any():
            figures.append(off(other[mask], one[mask]))
        if step > 1:  # the first step warms up, the second captures
            graphs.add(id(graphed.step._graph))
        if step == steps // 4:
            kept = [[state.clone() for state in model.states] for model in (plain, graphed)]
        if step == steps // 2:
            reset = torch.arange(ROWS, device=device) == 1
            for model in (plain, graphed):
                model.lm.reset_streaming(reset)
        if step == steps * 3 // 4:
            for model, states in zip((plain, graphed), kept, strict=True):
                model.restore(states)
    return worst(figures), len(graphs) == 1


def twins(make: Any, settings: dict[str, Any]) -> tuple[LMModel, LMModel]:
    """Two patched models of the same weights, with memories that matter."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        lm = make()
        ttt_cache.patch(lm, **settings)
        stir(lm)
        found.append(lm)
    return found[0], found[1]
