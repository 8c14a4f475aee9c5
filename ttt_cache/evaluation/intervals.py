"""How sure a figure is: bootstrap over files (Efron and Tibshirani 1993, chapter 13)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

DRAWS = 1000
SHARE = 0.95  # of the draws that an interval holds


class Interval(NamedTuple):
    """A figure of all files, and between which it lies; float64, NaN where there is nothing."""

    value: Tensor
    low: Tensor
    high: Tensor

    def rows(self) -> list[list[float | None]]:
        """`[value, low, high]` of each figure, fit for JSON: `None` where there is none."""
        return [[_number(x) for x in row] for row in torch.stack(self, dim=-1).view(-1, 3).tolist()]

    def row(self) -> list[float | None]:
        """Likewise, of a single figure."""
        (row,) = self.rows()
        return row


def bootstrap(figures: Callable[[Tensor], Tensor], files: int, seed: int = 0) -> Interval:
    """Percentile intervals of figures that files have together.

    Files are drawn anew with replacement, whole: frames of one conversation are not independent.
    What is drawn for all arms of a comparison in one call is drawn for all alike, so comparisons
    are paired.

    Args:
        figures: of weights `[n, files]`, float64, how often each file counts, to `[n, ...]`.
        files: of one alone there is no interval, both ends are NaN.
        seed: of the draws.

    Returns:
        for each figure its value with every file once, and the middle 95% of 1,000 draws.
    """
    value = figures(torch.ones(1, files, dtype=torch.float64))[0]
    if files < 2 or not value.numel():
        return Interval(value, *torch.full((2, *value.shape), torch.nan, dtype=value.dtype))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(files, (DRAWS, files), generator=generator)
    weights = torch.zeros(DRAWS, files, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(weights))
    ends = torch.tensor([(1 - SHARE) / 2, (1 + SHARE) / 2], dtype=torch.float64)
    low, high = figures(weights).nanquantile(ends, dim=0)
    return Interval(value, low, high)


def _number(x: float) -> float | None:
    return x if x == x else None
