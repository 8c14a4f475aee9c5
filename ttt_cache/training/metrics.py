"""`metrics.jsonl`: one JSON object per line, whole up to the last line whatever ended the run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttt_cache.files import write_whole

NAME = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, in order.

    Returns:
        each with `step` (int), `stage` (str) and its figures; `None` where one was not finite. A
        last line that a kill cut short is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is damaged; the message names file and line.
    """
    return [record for _, record in _lines(path)]


def append(path: Path, step: int, stage: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Add one line and return its record. What is not finite becomes `null`, as JSON has no NaN.

    Raises:
        TypeError: a figure is not a number; its name is in the message.
        OSError: the line could not be written; the error names the file.
    """
    record = {"step": step, "stage": stage}
    record |= {name: _number(name, value) for name, value in figures.items()}
    line = json.dumps(record, allow_nan=False) + "\n"
    try:
        with path.open("ab") as file:
            file.write(line.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    return record


def truncate(path: Path, step: int) -> None:
    """Drop what a run that goes on after `step` will write again, and a torn last line.

    At step 0 everything goes, an evaluation before the first step included. The file is replaced
    as a whole or not at all.

    Raises:
        ValueError: a line is damaged; nothing has changed.
    """
    kept = [line for line, record in _lines(path) if step and record["step"] <= step]
    write_whole({path: lambda temporary: temporary.write_bytes(b"".join(kept))})


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    *complete, _ = path.read_bytes().split(b"\n")  # what follows the last newline is torn
    return [(line + b"\n", _parsed(path, n, line)) for n, line in enumerate(complete, 1)]


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    step = record.get("step") if isinstance(record, dict) else None
    if not isinstance(record, dict) or type(step) is not int or "stage" not in record:
        raise ValueError(
            f"{path}:{number}: must be a JSON object with step and stage, got {line[:60]!r}; "
            "remove the line, or the file to begin it anew"
        )
    return record


def _number(name: str, value: Any) -> float | None:
    try:
        number = value if type(value) is int else float(value)
    except (TypeError, ValueError):
        raise TypeError(f"figure {name!r} must be a number, got {value!r}") from None
    return number if math.isfinite(number) else None
