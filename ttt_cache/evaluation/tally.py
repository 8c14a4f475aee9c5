"""Sums over frames by file and bin, in memory that grows with the bins, not with the frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FINE = 32  # bins of an octave; below twice as much every whole number has its own


class Tally:
    """Means of values by file and bin; values come in any order.

    Attributes:
        sums: of the values, float64 `[files, bins]`.
        counts: how many there were, likewise.
    """

    def __init__(self, sums: Tensor | None = None, counts: Tensor | None = None) -> None:
        empty = torch.zeros(0, 0, dtype=torch.float64)
        self.sums = empty if sums is None else sums
        self.counts = empty if counts is None else counts

    @property
    def files(self) -> int:
        return self.sums.shape[0]

    @property
    def bins(self) -> int:
        return self.sums.shape[1]

    def add(self, values: Tensor, bins: Tensor, fresh: bool) -> None:
        """Count values `[B, S]` in bins int64 `[B, S]`; NaN stands where there is no value.

        Args:
            fresh: the B rows are new files; else those of the last call.
        """
        rows, counted = values.shape[0], ~values.isnan()
        files = self.files + (rows if fresh else 0)
        highest = int(bins.masked_fill(~counted, -1).max()) + 1 if bins.numel() else 0
        size = files, max(highest, self.bins)
        self.sums, self.counts = padded(self.sums, *size), padded(self.counts, *size)
        index = bins.masked_fill(~counted, 0)
        if self.bins:
            self.sums[-rows:].scatter_add_(1, index, values.double().masked_fill(~counted, 0))
            self.counts[-rows:].scatter_add_(1, index, counted.double())

    def as_json(self) -> dict[str, Any]:
        """All that it holds, fit for JSON."""
        return {"sums": self.sums.tolist(), "counts": self.counts.long().tolist()}

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> Tally:
        sums, counts = (torch.tensor(held[n], dtype=torch.float64) for n in ("sums", "counts"))
        return cls(sums, counts) if sums.dim() == 2 else cls()


def padded(table: Tensor, files: int, bins: int) -> Tensor:
    """A table `[files, bins]` with zeros at its ends where it is smaller, cut where larger."""
    whole = table.new_zeros(files, bins)
    whole[: table.shape[0], : table.shape[1]] = table[:files, :bins]
    return whole


def ratio(sums: Tensor, counts: Tensor) -> Tensor:
    """Means, NaN where nothing was counted."""
    return torch.where(counts > 0, sums / counts, torch.nan)


def fine(number: Tensor) -> Tensor:
    """The bin of whole numbers from 0 on: their own below 64, then 32 bins to an octave."""
    octave = number.clamp_min(1).double().log2().floor().long() - FINE.bit_length() + 1
    octave = octave.clamp_min(0)
    return FINE * octave + (number >> octave)


def fine_edges(bins: int) -> Tensor:
    """Where bins 0, 1, ... of `fine` begin, and the last one ends; int64 `[bins + 1]`."""
    index = torch.arange(bins + 1)
    octave = (index // FINE - 1).clamp_min(0)
    return (index - FINE * octave) << octave


def octave(number: Tensor) -> Tensor:
    """The bin of whole numbers from 0 on: 0, then 1, 2 to 3, 4 to 7 and so on."""
    return torch.where(number > 0, number.clamp_min(1).double().log2().floor().long() + 1, 0)


def octave_edges(bins: int) -> Tensor:
    """Where bins 0, 1, ... of `octave` begin, and the last one ends; int64 `[bins + 1]`."""
    return torch.cat([torch.zeros(1, dtype=torch.long), 1 << torch.arange(bins)])
