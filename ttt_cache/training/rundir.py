"""The folder of a run: what it is, and whether a run may go on in it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ttt_cache.files import write_whole

from .checkpoint import checkpoints
from .metrics import NAME as METRICS
from .settings import Settings

NAME = "settings.json"
# Keys that may differ between a run and its continuation: they change no result.
FREE = ("overwrite_run_dir", "num_ckpt_keep", "log_freq", "ckpt_freq", "do_ckpt", "wandb")
SHARE = ("batch_size", "num_microbatches")  # rows may be spread anew over processes


def open_run(settings: Settings, rows: int) -> Path | None:
    """Make the run's folder, or find what to go on from; on the main process only.

    A run that was refused before its first step may come back with other settings.

    Args:
        rows: of a batch, over all microbatches and processes.

    Returns:
        the newest checkpoint, or `None` to begin.

    Raises:
        ValueError: the folder holds another run, or something else; the message names the key.
    """
    run_dir = Path(settings.run_dir)
    ours = settings.model_dump(mode="json", exclude={*FREE, *SHARE}) | {"rows": rows}
    record = run_dir / NAME
    if settings.overwrite_run_dir and record.is_file():
        shutil.rmtree(run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"run_dir {run_dir} must be a folder")
    if record.is_file() and (checkpoints(run_dir) or (run_dir / METRICS).exists()):
        _same(record, ours)
    elif not record.is_file() and run_dir.is_dir() and any(run_dir.iterdir()):
        raise ValueError(f"run_dir {run_dir} must be empty or hold a run; it has no {NAME}")
    else:
        run_dir.mkdir(parents=True, exist_ok=True)
        text = json.dumps(ours, indent=2) + "\n"
        write_whole({record: lambda path: path.write_text(text, encoding="utf-8")})
    if not os.access(run_dir, os.W_OK):
        raise ValueError(f"run_dir {run_dir} must be a folder that can be written to")
    return begins_at(run_dir)


def begins_at(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run; `None` where there is none."""
    return next(reversed(checkpoints(run_dir)), None)


def _same(record: Path, ours: dict[str, Any]) -> None:
    try:
        theirs = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{record} is damaged: {error}") from error
    here, there = _flat(ours), _flat(theirs)
    for key in sorted(here.keys() | there.keys()):
        if here.get(key) != there.get(key):
            raise ValueError(
                f"{key} is {here.get(key)!r}, but the run in {record.parent} began with "
                f"{there.get(key)!r}; give another run_dir, or overwrite_run_dir: true"
            )


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {key: value}
    return {
        name: leaf
        for part, inner in value.items()
        for name, leaf in _flat(inner, f"{key}.{part}" if key else part).items()
    }
