"""Row by row: one mask entry per conversation, whatever the shape of the tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, where


def per_row(mask: Tensor, like: Tensor) -> Tensor:
    """A `[B]` mask shaped to broadcast over `like` `[B, ...]`."""
    return mask.view(-1, *([1] * (like.dim() - 1)))


def choose(mask: Tensor, new: dict[str, Tensor], old: dict[str, Tensor]) -> dict[str, Tensor]:
    """Row by row, the tensors `new` where `mask` (bool `[B]`), else `old`."""
    return {name: where(per_row(mask, t), t, old[name]) for name, t in new.items()}


def captured(device: torch.device) -> bool:
    """Whether steps on a device may be captured and replayed, so that none may look at data."""
    return device.type != "cpu"


def unless_all(mask: Tensor) -> Tensor | None:
    """The mask; `None` if every row is in it, where that may be looked at."""
    return None if not captured(mask.device) and mask.all() else mask


def change(
    mask: Tensor, tensors: dict[str, Tensor], edit: Callable[..., None], *given: Tensor
) -> None:
    """Let `edit(part, *given)` change the rows of `mask` in place; others keep their bits.

    Where steps are captured, all rows of a copy are changed and those of the mask taken over.
    Elsewhere `edit` gets the rows of the mask only, and is not called if there are none.

    Args:
        mask: bool `[B]`.
        tensors: what is changed, `[B, *]` each; `part` has their names.
        given: what `edit` reads beside them, `[B, *]` each.
    """
    if captured(mask.device):
        part = {name: t.clone() for name, t in tensors.items()}
        edit(part, *given)
        for name, old in tensors.items():
            old.copy_(where(per_row(mask, old), part[name], old))
        return
    rows = [row for row, chosen in enumerate(mask.tolist()) if chosen]
    if not rows:
        return
    if rows[-1] - rows[0] == len(rows) - 1:  # all, or one: views instead of copies
        run = slice(rows[0], rows[-1] + 1)
        edit({name: t[run] for name, t in tensors.items()}, *(t[run] for t in given))
        return
    part = {name: t[rows] for name, t in tensors.items()}
    edit(part, *(t[rows] for t in given))
    for name, old in tensors.items():
        old[rows] = part[name]
