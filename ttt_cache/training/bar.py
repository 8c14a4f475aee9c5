"""Progress on standard error: a live bar in a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from datetime import timedelta

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

PAUSE = 10.0  # seconds between lines where nobody watches live


class _WithFigures(Progress):
    """A bar, and the figures below it: side by side they need more than 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            yield Text(task.fields["figures"])


class Bar:
    """Shows stage, step, the newest figures and the time left; a context manager.

    Args:
        total: steps of the whole run; `first` of them were made before.
    """

    def __init__(self, total: int, first: int) -> None:
        self.total, self.first = total, first
        self.stage, self.figures = "", dict[str, float]()
        self.start, self.said = time.monotonic(), -PAUSE
        self.console = Console(stderr=True)
        self.live = _WithFigures(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self.console,
            refresh_per_second=4,
        )
        self.task = self.live.add_task("", total=total, completed=first, figures="")

    def __enter__(self) -> Bar:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def update(self, step: int, stage: str, figures: Mapping[str, float]) -> None:
        """Show a step; figures that are not measured in every step stay until the next stage."""
        if stage != self.stage:
            self.stage, self.figures = stage, {}
        self.figures |= figures
        text = " ".join(status(self.figures).values())
        if self.console.is_terminal:
            self.live.update(self.task, description=stage, completed=step, figures=text)
            return
        now = time.monotonic()
        if now - self.said >= PAUSE or step >= self.total:
            self.said = now
            line = f"{stage} {step}/{self.total} {text}{self._left(step, now)}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _left(self, step: int, now: float) -> str:
        made = step - self.first
        if made <= 0:
            return ""
        return f" {timedelta(seconds=round((now - self.start) / made * (self.total - step)))} left"


def status(figures: Mapping[str, float]) -> dict[str, str]:
    """What a person is told of a step, by figure; nothing for figures that are not there."""
    shown = {
        "loss": ("loss {:.4g}", figures.get("loss")),
        "error": ("error {:.4g}", mean(figures, "error")),
        "eval": ("eval {:.4g}", figures.get("eval/loss")),
        "gate": ("gate {:.1%}", mean(figures, "gate")),
        "mass": ("mass {:.1%}", mean(figures, "mass")),
        "speed": ("{:,.0f} tokens/s", figures.get("tokens_per_second")),
    }
    return {name: text.format(value) for name, (text, value) in shown.items() if value is not None}


def mean(figures: Mapping[str, float], name: str) -> float | None:
    """Mean over layers of `name/<layer>`; `None` where none is known."""
    values = [value for key, value in figures.items() if key.startswith(f"{name}/")]
    return sum(values) / len(values) if values else None
