"""Every preset at Moshi 7B's shapes: state of a conversation, operations and time of a step.

State: the whole model on the meta device, bfloat16, all 32 layers patched, one conversation.

Operations: of one streaming step of one layer's attention core (`core.py`), mean over a chunk, so
that the step which publishes a memory version counts. MFLOP are two for each multiply-add of a
matrix product, as `torch.utils.flop_counter` counts them; elementwise work is not in them, such as
the distances of `cluster`. ATen operations are those dispatched, views included; `not views` leaves
those out.

Time: of the same cores, in turn with stock, float32 on one thread, all rings full.

No speed is printed unless every preset does what it must. A new memory adds nothing, so a preset
with a window must equal stock until it evicts: its first steps are compared. One that keeps all of
stock's context must equal stock past that, too. The TTT layers have no window, and new ones answer
with zeros: their way out is given random values, and steps must equal one parallel call.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import asdict
from typing import Any

import torch
from common import CONTEXT, environment, publish, quiet_process
from core import (
    CHUNK,
    TOLERANCE,
    Arm,
    compare,
    frames,
    interleave,
    medians,
    off,
    parse,
    require,
    worst,
)
from moshi.models.loaders import get_moshi_lm
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import ttt_cache
from ttt_cache.evaluation.lines import Line
from ttt_cache.memory import QueryReader
from ttt_cache.patched import PatchedState
from ttt_cache.presets import PRESETS

RECENT = 100  # the default: what every window of a preset holds at least
STEPS = 24  # of a TTT layer, beside one call
Row = dict[str, Any]


class Operations(TorchDispatchMode):
    """Counts what is dispatched, with and without views."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.not_views = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += 1
        self.not_views += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(arm: Arm, batch_size: int) -> Row:
    """Of one step, mean over a chunk: MFLOP for a token, operations for all rows together."""
    # The fused attention of the CPU is unknown to the counter; its parts are not.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        arm.run(*frames(CHUNK, batch_size))
    with Operations() as counted:
        arm.run(*frames(CHUNK, batch_size))
    mflop = flops.get_total_flops() / CHUNK / batch_size / 1e6
    total, not_views = (round(n / CHUNK) for n in (counted.total, counted.not_views))
    return {"mflop": mflop, "operations": total, "not_views": not_views}


def state_mb() -> dict[str, float]:
    """MB of streaming state of one conversation, by preset."""
    model = get_moshi_lm(None, device="meta", dtype=torch.bfloat16)
    found = {}
    with contextlib.redirect_stdout(io.StringIO()):  # reports print themselves
        found["stock"] = ttt_cache.report(model).stock_bytes / 1e6
        for name in PRESETS:
            with ttt_cache.patch(model, preset=name):
                found[name] = ttt_cache.report(model).patched_bytes / 1e6
    return found


def parallel_off(arm: Arm, batch_size: int) -> float:
    """How far steps of a TTT layer are from one call without state."""
    cache = arm.cache
    assert isinstance(cache.reader, QueryReader)
    torch.nn.init.normal_(cache.reader.to_output, std=cache.reader.to_output.shape[0] ** -0.5)
    hidden, projected = frames(STEPS, batch_size)
    steps, _ = arm.run(hidden, projected)
    q, k, v = (
        part.transpose(0, 1).flatten(2).unflatten(-1, (cache.num_heads, -1)).transpose(1, 2)
        for part in projected.chunk(3, dim=-1)
    )
    together, _ = cache(q, k, v, hidden.transpose(0, 1).flatten(2))
    return off(torch.cat(steps, dim=1), together.transpose(1, 2).flatten(2))


def check(arms: dict[str, Arm], batch_size: int) -> dict[str, float]:
    """Every preset does what it must; rings are full afterwards.

    Raises:
        SystemExit: one does not; there is nothing to time.
    """
    windowed = {n: arm for n, arm in arms.items() if n == "stock" or arm.cache.window.recent}
    layers = {n: parallel_off(arm, batch_size) for n, arm in arms.items() if n not in windowed}
    require(layers, f"makes other outputs step by step than at once, batch {batch_size}")
    early = compare(windowed, RECENT, batch_size)
    require(early, f"is not stock before its first eviction, batch {batch_size}")
    for arm in arms.values():
        arm.fill()
    ring = arms["stock"].attention._streaming_state
    assert ring is not None and ring.kv_cache is not None
    whole = {n: arm for n, arm in windowed.items() if n != "stock" and keeps_all(arm)}
    for arm in whole.values():
        state = arm.attention._streaming_state
        assert isinstance(state, PatchedState)
        state.cache.keys.copy_(ring.kv_cache.cache[0])
        state.cache.values.copy_(ring.kv_cache.cache[1])
    late = compare({"stock": arms["stock"], **whole}, 2 * CHUNK, batch_size)
    require(late, f"is not stock with a full ring, batch {batch_size}")
    return {name: worst([f.get(name, 0.0) for f in (layers, early, late)]) for name in PRESETS}


def keeps_all(arm: Arm) -> bool:
    return arm.cache.window.capacity == CONTEXT


def measure(batch_size: int, repetitions: int) -> dict[str, Row]:
    """What was counted and timed, by preset, after the check."""
    settings: dict[str, Row] = {"stock": {}} | {name: {"preset": name} for name in PRESETS}
    arms = {name: Arm(given, batch_size) for name, given in settings.items()}
    apart = check(arms, batch_size)
    rows = {name: operations(arm, batch_size) for name, arm in arms.items()}
    samples = interleave(arms, batch_size, repetitions)
    for name, row in rows.items():
        row["off"] = apart.get(name, 0.0)
        row["samples_ms"] = {clock: by_arm[name] for clock, by_arm in samples.items()}
        for clock, by_arm in samples.items():
            middle = medians(by_arm)
            row[clock], row[f"{clock}_ratio"] = middle[name], middle[name] / middle["stock"]
    return rows


def table_of(state: dict[str, float], results: dict[int, dict[str, Row]]) -> Table:
    table = Table(title="presets: one layer of Moshi 7B, one token; steps beside stock's")
    table.add_column("preset", no_wrap=True)
    for column in ("state MB", "MFLOP", "ATen ops", "not views"):
        table.add_column(column, justify="right")
    for batch in results:
        for clock in ("wall", "processor"):
            table.add_column(f"step, batch {batch}, {clock}", justify="right")
    first = next(iter(results.values()))
    for name, row in first.items():
        ratios = [
            rows[name][f"{c}_ratio"] for rows in results.values() for c in ("wall", "processor")
        ]
        counts = (f"{state[name]:,.2f}", f"{row['mflop']:.2f}", row["operations"], row["not_views"])
        table.add_row(name, *map(str, counts), *(f"{ratio:.3f}" for ratio in ratios))
    return table


@torch.no_grad()
def main() -> None:
    quiet_process()
    options = parse(__doc__, "presets", batch_sizes=[1, 8])
    record = environment(options.seed, "float32; state: bfloat16")
    torch.manual_seed(options.seed)
    state = state_mb()
    results = {batch: measure(batch, options.repetitions) for batch in options.batch_sizes}
    lines = []
    for batch, rows in results.items():
        off_by = worst(row["off"] for row in rows.values())
        lines.append(Line(f"batch {batch}: largest difference in the check", off_by, "", TOLERANCE))
        for clock in ("wall", "processor"):
            lines.append(Line(f"batch {batch}, {clock}: stock", rows["stock"][clock], "ms a step"))
    settings = {
        "presets": {name: asdict(ttt_cache.CacheConfig(preset=name)) for name in PRESETS},
        "repetitions": options.repetitions,
        "steps_per_sample": CHUNK,
    }
    publish("presets", options.out, record, settings, lines, state_mb=state, results=results)
    Console(width=140).print(table_of(state, results))


if __name__ == "__main__":
    main()
