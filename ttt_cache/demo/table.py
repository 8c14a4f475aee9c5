"""What the demo prints at its end."""

from __future__ import annotations

from typing import Any

from rich.table import Table


def table(figures: dict[str, Any]) -> Table:
    """A table of the figures that `figures.as_json` returns, one column per model."""
    first, last = (len(range(*figures[key])) for key in ("first_frames", "last_frames"))
    result = Table(title=f"{figures['frames']} frames ({figures['minutes']:.1f} minutes)")
    result.add_column("per conversation")
    for name in ("stock", "patched"):
        result.add_column(name, justify="right")

    def row(label: str, text: str, *keys: str) -> None:
        values = ([figures[name][key] for key in keys] for name in ("stock", "patched"))
        result.add_row(label, *(text.format(*value) for value in values))

    row("state at the start (bytes)", "{:,}", "state_bytes_start")
    row("state at the end (bytes)", "{:,}", "state_bytes_end")
    row("largest state sampled (bytes)", "{:,}", "state_bytes_max")
    result.add_section()
    step = "{:.2f} / {:.2f}"
    row(f"step, first {first}: median / p99 (ms)", step, "first_median_ms", "first_p99_ms")
    row(f"step, last {last}: median / p99 (ms)", step, "last_median_ms", "last_p99_ms")
    row("compute per second of speech (s)", "{:.3f}", "real_time_factor")
    return result
