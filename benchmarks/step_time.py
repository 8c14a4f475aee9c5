"""Time of one attention core at Moshi 7B's widths: stock with a full ring, patched, window only.

How the core is cut out and timed: `core.py`. Beside it, one whole patched layer and what is left of
that layer without the core: its norms, its projections and its feed-forward. No speed is printed
unless the patched cores equal stock before their first eviction.
"""

from __future__ import annotations

from typing import Any

import torch
from common import DIM, HEADS, environment, publish, quiet_process, transformer
from core import (
    CHUNK,
    TOLERANCE,
    Arm,
    compare,
    interleave,
    medians,
    parse,
    require,
    timed,
    worst,
)
from torch import Tensor

import ttt_cache
from ttt_cache.evaluation.lines import Line
from ttt_cache.patched import PatchedState
from ttt_cache.targets import attention_of

RECENT, FEED_FORWARD = 100, 16_896
PATCHED: dict[str, Any] = {"recent": RECENT, "chunk": CHUNK}
SETTINGS: dict[str, dict[str, Any]] = {
    "stock": {},
    "patched": PATCHED,
    "staggered": PATCHED,
    "window": {"recent": RECENT, "memory": "none"},
}
AT_MOST = {1: 0.14, 4: 0.09, 8: 0.06}  # of stock, by batch size
LAYER_AT_MOST = 1.05  # of the layer without its core
CORE_MS, LAYER_MS = 5, 10  # the limits of the plan for a frame: cache operations, and a step


class Layer:
    """A whole layer with the state of a core, streaming; or what is left of it without the core."""

    def __init__(self, core: Arm) -> None:
        model = transformer(DIM, HEADS, 1, hidden=FEED_FORWARD)
        ttt_cache.patch(model, **PATCHED)
        model.streaming_forever(core.state.batch_size)
        self.layer, self.attention = model.layers[0], attention_of(model, 0)
        state, filled = self.attention._streaming_state, core.state
        assert isinstance(state, PatchedState) and isinstance(filled, PatchedState)
        state.cache.commit(filled.cache, state.exec_mask)

    def run(self, hidden: Tensor, _: Tensor) -> tuple[list[Tensor], tuple[int, ...]]:
        return timed(self.layer, hidden)


class Coreless:
    """The same layer with its projections next to each other."""

    def __init__(self, whole: Layer) -> None:
        self.whole = whole

    def run(self, hidden: Tensor, given: Tensor) -> tuple[list[Tensor], tuple[int, ...]]:
        attention = self.whole.attention
        attention.forward = self._projected  # type: ignore[method-assign]
        try:
            return self.whole.run(hidden, given)
        finally:
            del attention.forward

    def _projected(self, x: Tensor, *_: Tensor) -> Tensor:
        attention = self.whole.attention
        return attention.out_projs[0](attention.in_projs[0](x)[..., :DIM])


def measure(batch_size: int, repetitions: int) -> dict[str, Any]:
    """Milliseconds of a step for every sample of every arm, after the check."""
    arms = {name: Arm(settings, batch_size) for name, settings in SETTINGS.items()}
    apart = compare(arms, RECENT, batch_size)
    require(apart, f"is not stock before its first eviction at batch {batch_size}")
    for arm in arms.values():
        arm.fill()
    arms["staggered"].stagger()
    samples = interleave(arms, batch_size, repetitions)
    layer = Layer(arms["patched"])
    del arms
    of_layer = interleave({"layer": layer, "coreless": Coreless(layer)}, batch_size, repetitions)
    samples = {clock: samples[clock] | of_layer[clock] for clock in samples}
    off = worst(apart.values())
    return {"batch_size": batch_size, "off_before_eviction": off, "samples_ms": samples}


def lines_of(result: dict[str, Any]) -> list[Line]:
    size = result["batch_size"]
    off = result["off_before_eviction"]
    lines = [Line(f"batch {size}: off before eviction", off, "of scale", TOLERANCE)]
    for clock, samples in result["samples_ms"].items():
        at, ms = f"batch {size}, {clock}", medians(samples)
        for name, value in ms.items():
            limit = {"patched": CORE_MS, "layer": LAYER_MS}.get(name)
            lines.append(Line(f"{at}: {name}", value, "ms a step", below=limit))
        for name in ("patched", "staggered", "window"):
            target = None if name == "window" else AT_MOST.get(size)
            lines.append(Line(f"{at}: {name} / stock", ms[name] / ms["stock"], at_most=target))
        ratio = ms["layer"] / ms["coreless"]
        lines.append(Line(f"{at}: layer / coreless", ratio, at_most=LAYER_AT_MOST))
    return lines


@torch.no_grad()
def main() -> None:
    quiet_process()
    options = parse(__doc__, "step_time", batch_sizes=[1, 4, 8])
    record = environment(options.seed, "float32")
    torch.manual_seed(options.seed)
    results = [measure(batch, options.repetitions) for batch in options.batch_sizes]
    lines = [line for result in results for line in lines_of(result)]
    settings = {"arms": SETTINGS, "repetitions": options.repetitions, "steps_per_sample": CHUNK}
    publish("step_time", options.out, record, settings, lines, results=results)


if __name__ == "__main__":
    main()
