"""Row by row: one mask entry per conversation, whatever the shape of the tensor."""

from __future__ import annotations

from torch import Tensor, where


def per_row(mask: Tensor, like: Tensor) -> Tensor:
    """A `[B]` mask shaped to broadcast over `like` `[B, ...]`."""
    return mask.view(-1, *([1] * (like.dim() - 1)))


def choose(mask: Tensor, new: dict[str, Tensor], old: dict[str, Tensor]) -> dict[str, Tensor]:
    """Row by row, the tensors `new` where `mask` (bool `[B]`), else `old`."""
    return {name: where(per_row(mask, t), t, old[name]) for name, t in new.items()}
