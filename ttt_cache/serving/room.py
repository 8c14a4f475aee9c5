"""Whether there is memory for the rows of a model, in a sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from moshi.models.lm import LMModel

from ..report import measure

SHORT = ("allocate memory", "out of memory")  # PyTorch's words: on a CPU it has no type for that


def check_room(rows: int, lm: LMModel) -> int:
    """Refuse what cannot fit before anything is allocated; returns the least bytes of a row.

    A system that promises more memory than it has would end the process later, without a word.

    Raises:
        ValueError: all of the device's memory would not hold the rows.
    """
    each = measure(lm).patched_bytes
    if rows * each > _memory(lm.device):
        raise ValueError(_refused(rows, each, lm.device))
    return each


@contextmanager
def room_for(rows: int, each: int, device: torch.device) -> Iterator[None]:
    """Say so where memory runs out while rows are laid out.

    Args:
        each: bytes of a row, as `check_room` returns them.

    Raises:
        ValueError: it did.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is of the second kind
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in SHORT):
            raise
        raise ValueError(_refused(rows, each, device)) from None


def _memory(device: torch.device) -> int:
    """Bytes that a device has, taken or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _refused(rows: int, each: int, device: torch.device) -> str:
    return (
        f"there is no memory for {rows} conversations on {device}: the language model's state of "
        f"each has {each / 1e6:,.2f} MB, beside Mimi's; choose fewer --rows"
    )
