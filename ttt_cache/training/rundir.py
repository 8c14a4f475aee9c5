"""The folder of a run: what it is, whether a run may go on in it, and who has it."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ttt_cache.files import write_whole

from .board import NAME as TENSORBOARD
from .checkpoint import ADAPTER, checkpoints
from .checkpoint import FOLDER as CHECKPOINTS
from .data.lock import only_writer
from .export import CONFIG, LORA, WEIGHTS
from .metrics import NAME as METRICS
from .metrics import read_metrics
from .picture import PICTURE
from .recorder import WANDB_ID
from .settings import Paths, Settings
from .summary import NAME as SUMMARY

NAME = "settings.json"
# What a run writes and may write anew. Tokenised recordings are not among it: they took hours.
OURS = (CHECKPOINTS, METRICS, TENSORBOARD, WANDB_ID, PICTURE, SUMMARY)
RESULTS = (ADAPTER, LORA, WEIGHTS)
OURS += (*RESULTS, CONFIG)
# Keys that may differ between a run and its continuation. They change no step: only what of the
# steps is shown and kept, and where. Rows may be spread anew over microbatches and processes.
FREE = {"run_dir", "overwrite_run_dir", "ttt_cache.codes_dir", "log_freq", "eval_freq", "do_eval"}
FREE |= {"do_ckpt", "ckpt_freq", "num_ckpt_keep", "save_adapters", "batch_size", "num_microbatches"}
# Where that lies whose content is compared: see `identity.sources`.
FREE |= {"data.train_data", "data.eval_data", "ttt_cache.adapter"}
FREE |= {f"moshi_paths.{name}" for name in Paths.model_fields if name != "hf_repo_id"}


def open_run(settings: Settings, rows: int, stack: ExitStack) -> Path | None:
    """Find what to go on from, and keep other runs out; on the main process only.

    Nothing of a run that is there changes. One that was refused before its first step may come
    back with other settings.

    Args:
        rows: of a batch, over all microbatches and processes.
        stack: the folder is this run's until the stack is closed.

    Returns:
        the newest checkpoint, or `None` to begin.

    Raises:
        ValueError: the folder holds another run, or something else; the message names the key.
        RuntimeError: another run is going on in it.
    """
    run_dir = Path(settings.run_dir)
    theirs = _record(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    if not os.access(run_dir, os.W_OK):
        raise ValueError(f"run_dir {run_dir} must be a folder that can be written to")
    stack.enter_context(only_writer(run_dir, "this run"))
    if theirs is None:
        _write(settings, rows)
    elif settings.overwrite_run_dir:
        _spare_inputs(settings)
    elif _left(run_dir):
        _same(theirs, _described(settings, rows), run_dir)
        _spare_results(settings)
    return begins_at(settings)


def begins_at(settings: Settings) -> Path | None:
    """The newest checkpoint of a run; `None` where there is none to go on from."""
    if settings.overwrite_run_dir:
        return None
    return next(reversed(checkpoints(Path(settings.run_dir))), None)


def begin_run(settings: Settings, rows: int) -> None:
    """Make room for a run that begins; on the main process, when all that it needs has loaded."""
    for name in OURS:
        path = Path(settings.run_dir) / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    _write(settings, rows)


def _record(run_dir: Path) -> dict[str, Any] | None:
    """The settings of the run in a folder, `None` if there is nothing in it that a run removes."""
    if not run_dir.exists():
        return None
    if not run_dir.is_dir():
        raise ValueError(f"run_dir {run_dir} must be a folder")
    path, refused = run_dir / NAME, f"run_dir {run_dir} must be empty or hold a run"
    if not path.is_file():
        if left := _left(run_dir):
            raise ValueError(f"{refused}; it has {left[0]}, but no {NAME}")
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{refused}; {path} is damaged, or not of a run: {error}") from error
    if not isinstance(record, dict) or not {"rows", "data", "ttt_cache"} <= record.keys():
        raise ValueError(f"{refused}; {path} is not of a run")
    return record


def _left(run_dir: Path) -> list[str]:
    """What is there that a run writes, and another one would remove."""
    return [name for name in OURS if os.path.lexists(run_dir / name)]


def _described(settings: Settings, rows: int) -> dict[str, Any]:
    """Without the block `wandb`, which may hold a key."""
    return settings.model_dump(mode="json", exclude={"wandb"}) | {"rows": rows}


def _write(settings: Settings, rows: int) -> None:
    text = json.dumps(_described(settings, rows), indent=2) + "\n"
    path = Path(settings.run_dir) / NAME
    write_whole({path: lambda temporary: temporary.write_text(text, encoding="utf-8")})


def _same(theirs: dict[str, Any], ours: dict[str, Any], run_dir: Path) -> None:
    here, there = _flat(ours), _flat(_completed(theirs))
    for key in sorted((here.keys() | there.keys()) - FREE):
        if here.get(key) != there.get(key):
            raise ValueError(
                f"{key} is {here.get(key)!r}, but the run in {run_dir} began with "
                f"{there.get(key)!r}; give another run_dir, or overwrite_run_dir: true"
            )


def _completed(theirs: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of keys that there were not yet when the run began."""
    try:
        settings = Settings.model_validate({k: v for k, v in theirs.items() if k != "rows"})
    except ValidationError:  # of a key or value that there is no more: it will be named
        return theirs
    return _described(settings, theirs["rows"])


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {key: value}
    return {
        name: leaf
        for part, inner in value.items()
        for name, leaf in _flat(inner, f"{key}.{part}" if key else part).items()
    }


def _spare_results(settings: Settings) -> None:
    """Refuse to begin again, unasked, where there is nothing to go on from but something to lose.

    A run that was to have checkpoints, and was killed before the first, has nothing to lose.
    """
    run_dir = Path(settings.run_dir)
    if checkpoints(run_dir):
        return
    lost = any(os.path.lexists(run_dir / name) for name in RESULTS)
    metrics = run_dir / METRICS
    if lost or (not settings.do_ckpt and metrics.exists() and read_metrics(metrics)):
        raise ValueError(
            f"run_dir {run_dir} holds a run that left no checkpoint to go on from; give another "
            "run_dir, or overwrite_run_dir: true to begin anew"
        )


def _spare_inputs(settings: Settings) -> None:
    """Refuse to overwrite what the new run needs."""
    files = settings.moshi_paths.model_dump(exclude={"hf_repo_id"}).values()
    run_dir = Path(settings.run_dir).resolve()
    for given in filter(None, (*files, settings.ttt_cache.adapter)):
        if any(Path(given).resolve().is_relative_to(run_dir / name) for name in OURS):
            raise ValueError(
                f"overwrite_run_dir: {given} is of the run that would be overwritten; give "
                "another run_dir"
            )
