"""What is asked of a session before anything of the running batch is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moshi.models.compression import MimiModel
from moshi.models.lm import LMGen
from torch import Tensor

from .checks import between
from .session_rows import shape_in_file, shares
from .session_state import Running


def check_streaming(gen: Any, mimi: Any) -> int:
    """Check the models that a session is of, and return how many conversations they stream.

    Raises:
        TypeError, ValueError, RuntimeError: as `save_session` says.
    """
    if not isinstance(gen, LMGen):
        raise TypeError(f"gen must be a moshi LMGen, got {type(gen).__name__}")
    if mimi is not None and not isinstance(mimi, MimiModel):
        raise TypeError(f"mimi must be a MimiModel or None, got {type(mimi).__name__}")
    parts = {"gen": gen, "gen.lm_model": gen.lm_model} | ({} if mimi is None else {"mimi": mimi})
    for name, module in parts.items():
        if module._streaming_state is None:
            raise RuntimeError(
                f"{name} is not streaming: a session is of a running conversation; start with "
                f"{name.split('.')[0]}.streaming(batch_size)"
            )
    assert gen._streaming_state is not None
    batch = gen._streaming_state.batch_size
    if mimi is not None and mimi._streaming_state.batch_size != batch:  # type: ignore[union-attr]
        got = mimi._streaming_state.batch_size  # type: ignore[union-attr]
        raise ValueError(f"mimi must stream {batch} rows as gen does, got {got}")
    return batch


def check_rows(row: int | Iterable[int] | None, batch: int, held: int, path: Path) -> list[int]:
    """The rows of a batch that the `held` conversations of a file go to.

    Raises:
        TypeError, ValueError: as `load_session` says.
    """
    if row is None:
        if held != batch:
            raise ValueError(
                f"{path} holds {_count(held)}, and gen streams {_count(batch)}: name the rows to "
                "restore with row"
            )
        return list(range(batch))
    given = row if isinstance(row, Iterable) else [row]
    rows = [between("row", each, 0, batch - 1) for each in given]
    if not rows or len(set(rows)) < len(rows):
        raise ValueError(f"row must name each row once, and at least one, got {rows}")
    if held not in (1, len(rows)):
        raise ValueError(
            f"row must name {held} rows, as many as {path} holds conversations, got {rows}"
        )
    return rows


def check_tensors(
    path: Path, found: Mapping[str, Tensor], now: Running, held: int, rows: Sequence[int]
) -> None:
    """Check that the `held` conversations of a file fit into the given rows.

    Args:
        found: what the file has of `now.rows`.

    Raises:
        ValueError: a tensor is missing, not in use here, of another shape or dtype, or is one that
            all rows share here and that these conversations have their own of.
    """
    check_names(path, found.keys(), now.rows.keys())
    for name, running in now.rows.items():
        wanted, saved = shape_in_file(running, now.batch, held), found[name]
        if list(saved.shape) != wanted or saved.dtype != running.tensor.dtype:
            raise ValueError(
                f"{path}: {name} must be {running.tensor.dtype} of shape {wanted}, got "
                f"{saved.dtype} of shape {list(saved.shape)}"
            )
        if not shares(running, saved, now.batch, rows):
            raise ValueError(
                f"{path}: {name} is one for all {now.batch} rows of gen, and these conversations "
                "have another"
            )


def check_names(path: Path, found: Iterable[str], wanted: Iterable[str]) -> None:
    """Raise `ValueError`, naming the first, unless the names are the same."""
    found, wanted = set(found), set(wanted)
    if missing := sorted(wanted - found):
        raise ValueError(f"{path}: {missing[0]} is in use here, and the session has none")
    if unknown := sorted(found - wanted):
        raise ValueError(f"{path}: {unknown[0]} is in the session, and not in use here")


def _count(conversations: int) -> str:
    return f"{conversations} conversation{'' if conversations == 1 else 's'}"
