"""Figures beside their targets, and whether these are met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Line:
    """One figure; the verdict compares it as measured, never rounded.

    Args:
        value: `None` where there is nothing to measure, which misses every target.
        at_least, at_most: inclusive.
        about: what else there is to know of it, such as its interval.
    """

    name: str
    value: float | None
    at_least: float | None = None
    at_most: float | None = None
    about: str = ""

    @property
    def target(self) -> str:
        if self.at_least is not None:
            return f"at least {self.at_least:,.7g}"
        return "" if self.at_most is None else f"at most {self.at_most:,.7g}"

    @property
    def verdict(self) -> str:
        if self.at_least is None and self.at_most is None:
            return ""
        if self.value is None:
            return "MISSED"
        met = self.at_least is None or self.value >= self.at_least
        met = met and (self.at_most is None or self.value <= self.at_most)
        return "met" if met else "MISSED"

    @property
    def figure(self) -> str:
        """The value with enough digits that a target just missed does not look met."""
        if self.value is None:
            return "-"
        if isinstance(self.value, int):
            return f"{self.value:,}"
        if 0 < abs(self.value) < 1e-3:
            return f"{self.value:.3g}"
        return f"{self.value:,.2f}" if abs(self.value) >= 100 else f"{self.value:.4f}"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def table_of(lines: Sequence[Line]) -> Table:
    """The lines as people read them."""
    table = Table(title="Targets")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for column in ("target", "verdict", "note"):
        table.add_column(column)
    for line in lines:
        style = "bold red" if line.verdict == "MISSED" else None
        table.add_row(line.name, line.figure, line.target, line.verdict, line.about, style=style)
    return table
