"""Figures beside their targets, and whether these are met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Line:
    """One figure; the verdict compares it as measured, never rounded.

    Args:
        value: `None` where there is nothing to measure; then no target is met or missed.
        at_most, at_least: inclusive.
        above, below: exclusive.
        about: what else there is to know of it, such as its interval.
    """

    name: str
    value: float | None
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    about: str = ""

    def unmeasured(self) -> Line:
        """The same where what was measured is not what the target is about."""
        return replace(self, value=None, about="")

    @property
    def target(self) -> str:
        bounds = {
            "at least": self.at_least,
            "at most": self.at_most,
            "above": self.above,
            "below": self.below,
        }
        return ", ".join(f"{name} {b:,.7g}" for name, b in bounds.items() if b is not None)

    @property
    def verdict(self) -> str:
        if not self.target:
            return ""
        if self.value is None:
            return "not measured"
        value = self.value
        met = (
            (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )
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


def table_of(lines: Sequence[Line], title: str = "Targets") -> Table:
    """The lines as people read them; units and notes only where one has them."""
    table = Table(title=title)
    columns = {"figure": "name", "value": "figure", "unit": "unit", "target": "target"}
    columns |= {"verdict": "verdict", "note": "about"}
    optional = [n for n in ("unit", "about") if not any(getattr(line, n) for line in lines)]
    shown = {title: name for title, name in columns.items() if name not in optional}
    for column in shown:
        table.add_column(column, justify="right" if column == "value" else "left")
    for line in lines:
        style = "bold red" if line.verdict == "MISSED" else None
        table.add_row(*(getattr(line, name) for name in shown.values()), style=style)
    return table
