"""Rows of a running state, out of it and into it, whatever the axis they lie along.

In a file every conversation has rows of its own, also where those of a batch share one: so any
conversation fits into any batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .session_state import Held


def taken(held: Held, batch: int, rows: Sequence[int]) -> Tensor:
    """The given conversations as they are kept in a file: contiguous, on the CPU."""
    index = held.index(batch, rows) or [0] * len(rows)
    if index == list(range(held.tensor.shape[held.axis])):
        return held.tensor.detach().cpu().contiguous()
    return held.tensor.detach().index_select(held.axis, _tensor(index, held)).cpu()


def shape_in_file(held: Held, batch: int, conversations: int) -> list[int]:
    """The shape that a file of so many conversations must have for a tensor."""
    shape = list(held.tensor.shape)
    shape[held.axis] = conversations * max(held.copies(batch), 1)
    return shape


def put(held: Held, saved: Tensor, batch: int, rows: Sequence[int]) -> None:
    """Write conversations from a file into the given rows, in place."""
    index = held.index(batch, rows)
    if not index:
        held.tensor.copy_(saved.narrow(held.axis, 0, 1))
    elif index == list(range(held.tensor.shape[held.axis])) and saved.shape == held.tensor.shape:
        held.tensor.copy_(saved)
    else:
        there = _spread(held, saved, batch, len(rows)).to(held.tensor.device)
        held.tensor.index_copy_(held.axis, _tensor(index, held), there)
    if held.attach is not None:
        held.attach()


def shares(held: Held, saved: Tensor, batch: int, rows: Sequence[int]) -> bool:
    """Whether conversations from a file may share the row that a running batch shares."""
    if held.copies(batch):
        return True
    first = saved.narrow(held.axis, 0, 1)
    alike = torch.equal(saved, first.expand_as(saved))
    return alike and (len(rows) == batch or torch.equal(first, held.tensor.cpu()))


def _spread(held: Held, saved: Tensor, batch: int, count: int) -> Tensor:
    """One conversation for each of `count` rows: those of the file, or its only one repeated."""
    copies = held.copies(batch)
    if saved.shape[held.axis] == copies * count:
        return saved
    return saved.repeat_interleave(count, dim=held.axis)


def _tensor(index: list[int], held: Held) -> Tensor:
    return torch.tensor(index, device=held.tensor.device)
