"""One page on a training run: what it is worth beside its controls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ttt_cache.files import write_whole

from .monitor import Observed
from .picture import PICTURE
from .result import RESET, THIS_RUN, WINDOW, Arms, Result, gain
from .verdict import verdict

NAME = "summary.md"
KINDS = {"loss": "loss", "text_loss": "text loss", "audio_loss": "audio loss"}
WINDOWS = (
    f" `{WINDOW}` sees as many frames as a patched layer ever sees exactly (`recent`, and the "
    f"`chunk - 1` that may wait to be evicted), `{RESET}` the very frames of this run."
)
MANY = 8  # layers that fit on the page one by one


def summarise(run_dir: Path, result: Result, facts: Mapping[str, str]) -> Path:
    """Write `run_dir/summary.md` and print the verdict and the table of controls.

    Args:
        facts: what was run, by name.

    Raises:
        OSError: the file could not be written.
    """
    said, arms = verdict(result), result.arms
    header = ["", *KINDS.values(), *([f"loss beside {WINDOW}"] if WINDOW in arms else [])]
    rows = [_row(arms, name) for name in arms]
    parts = [f"# Training run {run_dir.resolve().name}", said]
    if arms:
        parts += [_markdown(header, rows), "Mean losses on the same frames; lower is better."]
    if WINDOW in arms:
        parts[-1] += WINDOWS
    if result.observed:
        parts += ["## The memory, layer by layer", *_layers(result.observed)]
    if (run_dir / PICTURE).exists():
        parts += ["## The run", f"![Losses, gate, branch ratio and mass over steps]({PICTURE})"]
    if facts:
        parts += ["## What was run", _markdown(["", ""], [[k, v] for k, v in facts.items()])]
    text, path = "\n\n".join(parts) + "\n", run_dir / NAME
    write_whole({path: lambda temporary: temporary.write_text(text, encoding="utf-8")})
    _say(header, rows, said, path)
    return path


def _row(arms: Arms, name: str) -> list[str]:
    losses = [arms[name].get(kind) for kind in KINDS]
    beside = [_beside_window(arms, name)] if WINDOW in arms else []
    return [name, *(_number(loss) for loss in losses), *beside]


def _beside_window(arms: Arms, name: str) -> str:
    """How an arm's loss differs from that of the window, absolutely and as a share."""
    if name == WINDOW:
        return ""
    lower = gain({THIS_RUN: arms[name], WINDOW: arms[WINDOW]}, WINDOW)
    if lower is None:
        return "unknown"
    difference = arms[name]["loss"] - arms[WINDOW]["loss"]
    return f"{difference:+.4f} ({-lower:+.1%})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _layers(observed: Mapping[int, Observed]) -> list[str]:
    """A table of the layers, or of their extremes where there are many."""
    header = ["layer", "gate open", "mass on memory", "memory / window"]
    if len(observed) <= MANY:
        rows = [
            [str(n), f"{of.gate:.1%}", f"{of.mass:.1%}", f"{of.ratio:.3g}"]
            for n, of in sorted(observed.items())
        ]
        return [_markdown(header, rows)]
    rows = [["least", *_ranked(observed, 0)], ["median", *_ranked(observed, len(observed) // 2)]]
    rows.append(["most", *_ranked(observed, len(observed) - 1)])
    return [_markdown(header, rows), f"Of {len(observed)} layers; which of them in brackets."]


def _ranked(observed: Mapping[int, Observed], rank: int) -> list[str]:
    """The figures of that rank among all layers, each with its layer."""
    cells = []
    for name, form in (("gate", ".1%"), ("mass", ".1%"), ("ratio", ".3g")):
        value, layer = sorted((getattr(of, name), n) for n, of in observed.items())[rank]
        cells.append(f"{value:{form}} ({layer})")
    return cells


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    escaped = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _say(header: list[str], rows: list[list[str]], said: str, path: Path) -> None:
    table = Table()
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if rows:
        console.print(table)
    console.print(said, markup=False, highlight=False)
    console.print(f"Written: {path}", soft_wrap=True, markup=False)
