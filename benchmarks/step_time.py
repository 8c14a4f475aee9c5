"""Time of one attention core at Moshi 7B's widths: stock with a full ring, patched, window only.

How the core is cut out and timed: `core.py`. No speed is printed unless the patched cores equal
stock before their first eviction.
"""

from __future__ import annotations

from typing import Any

import torch
from common import environment, publish, quiet_process
from core import (
    CHUNK,
    TOLERANCE,
    Arm,
    compare,
    interleave,
    medians,
    parse,
    require,
    worst,
)

from ttt_cache.evaluation.lines import Line

RECENT = 100
SETTINGS: dict[str, dict[str, Any]] = {
    "stock": {},
    "patched": {"recent": RECENT, "chunk": CHUNK},
    "window": {"recent": RECENT, "memory": "none"},
}


def measure(batch_size: int, repetitions: int) -> dict[str, Any]:
    """Milliseconds of a step for every sample of every arm, after the check."""
    arms = {name: Arm(settings, batch_size) for name, settings in SETTINGS.items()}
    apart = compare(arms, RECENT, batch_size)
    require(apart, f"is not stock before its first eviction at batch {batch_size}")
    for arm in arms.values():
        arm.fill()
    samples = interleave(arms, batch_size, repetitions)
    off = worst(apart.values())
    return {"batch_size": batch_size, "off_before_eviction": off, "samples_ms": samples}


def lines_of(result: dict[str, Any]) -> list[Line]:
    batch = f"batch {result['batch_size']}"
    off = result["off_before_eviction"]
    lines = [Line(f"{batch}: off before eviction", off, "of scale", TOLERANCE)]
    for clock, samples in result["samples_ms"].items():
        middle = medians(samples)
        lines += [Line(f"{batch}, {clock}: {name}", ms, "ms a step") for name, ms in middle.items()]
        for name in ("patched", "window"):
            lines.append(Line(f"{batch}, {clock}: {name} / stock", middle[name] / middle["stock"]))
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
