"""A running conversation with Moshi: saved, gone on with, forked.

`docs/sessions.md` is the page for users. What a conversation consists of is `session_state.py`'s
to say, the file `session_file.py`'s, what it must belong to `session_identity.py`'s.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMGen
from torch import Tensor

from .checks import between
from .session_checks import check_names, check_rows, check_streaming, check_tensors
from .session_file import Described, read_session, write_session
from .session_generators import check_generators, generators_of, set_generators
from .session_identity import Identity, check_same, identity_of
from .session_rows import put, taken
from .session_state import Running, running
from .version import __version__

# First words of the names in a file: what each conversation has, and what only a batch has.
ROWS, COUNTERS, GENERATORS = "rows.", "counters.", "generators."


def save_session(
    gen: LMGen,
    file: str | os.PathLike[str],
    mimi: MimiModel | None = None,
    row: int | None = None,
) -> Path:
    """Write a running conversation to a file, exactly; call it between two steps.

    What is written: LMGen's tokens, positions, masks and conditions; every ring, memory and
    position of the language model, patched or not; Mimi's state, if it is given; with the whole
    batch the random generators too (the CPU's, and that of the GPU that the model is on). Not
    written: weights, LMGen's own arguments (temperature, hooks), and audio that you still buffer.
    The size of the file does not depend on how long the conversation has been.

    The file is written beside its place and then renamed: an error or a kill while writing leaves a
    session that is already there as it was.

    Args:
        gen: streaming; its model patched, or not.
        file: a safetensors file.
        mimi: streaming as many rows as `gen`.
        row: the conversation to save; `None` means the whole batch.

    Returns:
        the path of the file.

    Raises:
        TypeError: `gen` or `mimi` is no `LMGen` or `MimiModel`, `row` no integer.
        ValueError: `row` is out of range, or `mimi` has another batch size.
        RuntimeError: `gen` or `mimi` is not streaming, or has a state that is not known.
        OSError: the file cannot be written (`FileNotFoundError`: its folder is not there).

    Example:
        >>> ttt_cache.save_session(gen, "talk.safetensors", mimi=mimi)
    """
    path = Path(file)
    write_session(path, *take_session(gen, mimi, row))
    return path


def take_session(
    gen: LMGen,
    mimi: MimiModel | None = None,
    row: int | None = None,
    identity: Identity | None = None,
) -> tuple[dict[str, Tensor], Described]:
    """What `save_session` writes, for `write_session` to write when there is time for it.

    Taking is quick, writing is not: a server takes between two steps and writes beside them.

    Args:
        identity: what `identity_of` gave for `gen` and `mimi`, by whoever knows that neither has
            changed since; `None`: it is worked out anew, from every weight.

    Returns:
        tensors and description. Tensors on the CPU may be those of the running state: clone what is
        to outlive the next step.

    Raises:
        TypeError, ValueError, RuntimeError: as `save_session`.
    """
    batch = check_streaming(gen, mimi)
    rows = range(batch) if row is None else [between("row", row, 0, batch - 1)]
    now = running(gen, mimi)
    tensors = {ROWS + name: taken(held, batch, rows) for name, held in now.rows.items()}
    if row is None:
        tensors |= {COUNTERS + name: torch.tensor(count) for name, count in now.counts().items()}
        states = generators_of(gen.lm_model.device)
        tensors |= {GENERATORS + name: state for name, state in states.items()}
    return tensors, {
        "version": __version__,
        "moshi": version("moshi"),
        "conversations": len(rows),
        "whole_batch": row is None,
        "identity": identity or identity_of(gen, mimi),
    }


def load_session(
    gen: LMGen,
    file: str | os.PathLike[str],
    mimi: MimiModel | None = None,
    row: int | Iterable[int] | None = None,
) -> None:
    """Go on with a saved conversation, in place; call it between two steps.

    The state that is there is written over, so that CUDA graphs captured before go on with it.
    After a whole batch was restored, generators included, it goes on bit for bit as the one that
    was saved would have, in any process on the same kind of machine.

    With `row` the session becomes one conversation of a running batch, or several: a file of one
    conversation goes to every row that is given, a file of n to n rows in order. All other rows
    keep every bit. The random generators are left alone then, since Moshi draws for the whole batch
    at once: under greedy decoding the conversation goes on with the same tokens. Its exec mask is
    restored like all else. Its age may differ from that of the other rows: give LMGen
    `support_out_of_sync=True`, or it returns `None` until the youngest row has something to give,
    as after a reset of some rows.

    Args:
        gen: streaming, with the model, adapter and settings that the session was saved with.
        mimi: given if and only if it was when the session was saved.
        row: where to; `None` means the whole batch, which must be of the session's size.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: `gen`, `mimi` or `row` is of another type.
        ValueError: the file is damaged, no session, or one of another model, adapter, settings,
            dtype or batch size; `row` is out of range or named twice.
        RuntimeError: `gen` or `mimi` is not streaming, or has a state that is not known.
        Everything is checked before anything is changed.

    Example:
        >>> ttt_cache.load_session(gen, "talk.safetensors", mimi=mimi)
        >>> ttt_cache.load_session(gen, "talk.safetensors", mimi=mimi, row=[2, 5])  # forked
    """
    path = Path(file)
    check_streaming(gen, mimi)
    put_session(gen, path, *read_session(path), mimi=mimi, row=row)


def put_session(
    gen: LMGen,
    path: Path,
    tensors: dict[str, Tensor],
    described: Described,
    mimi: MimiModel | None = None,
    row: int | Iterable[int] | None = None,
    identity: Identity | None = None,
) -> None:
    """Go on with a session that `read_session` has read from `path`; as `load_session` else.

    Args:
        identity: as for `take_session`.
    """
    batch = check_streaming(gen, mimi)
    check_same(path, described["identity"], identity or identity_of(gen, mimi))
    rows = check_rows(row, batch, described["conversations"], path)
    now = running(gen, mimi)
    saved = _part(tensors, ROWS)
    check_tensors(path, saved, now, described["conversations"], rows)
    counters: dict[str, int] = {}
    generators: dict[str, Tensor] = {}
    if row is None and described["whole_batch"]:
        counted, generators = _part(tensors, COUNTERS), _part(tensors, GENERATORS)
        check_names(path, counted, now.counters)
        counters = {name: _count(path, name, count) for name, count in counted.items()}
        check_generators(path, generators, gen.lm_model.device)
    # Nothing is refused from here on, and nothing was changed before.
    if not counters:
        _set_age(now, saved["gen.offsets"], rows)
    # A state that was made under inference mode can be written only there; others may be.
    with torch.inference_mode():
        for name, held in now.rows.items():
            put(held, saved[name], batch, rows)
    for name, count in counters.items():
        state, attribute = now.counters[name]
        setattr(state, attribute, count)
    set_generators(generators, gen.lm_model.device)


def _part(tensors: dict[str, Tensor], first: str) -> dict[str, Tensor]:
    """What a file has under names that begin so, without that beginning."""
    return {name.removeprefix(first): t for name, t in tensors.items() if name.startswith(first)}


def _count(path: Path, name: str, saved: Tensor) -> int:
    if saved.shape or saved.dtype != torch.int64:
        got = f"{saved.dtype} of shape {list(saved.shape)}"
        raise ValueError(f"{path}: {name} must be one torch.int64, got {got}")
    return int(saved)


def _set_age(now: Running, offsets: Tensor, rows: Sequence[int]) -> None:
    """LMGen returns `None` until its youngest row has something to give, by a count of its own that
    a reset of some rows sets to 0. Restored rows bring their age instead."""
    state, attribute = now.counters["gen.offset_cpu"]
    ages = [int(offsets.min())]
    if len(rows) < now.batch:
        ages.append(getattr(state, attribute))
    setattr(state, attribute, min(ages))
