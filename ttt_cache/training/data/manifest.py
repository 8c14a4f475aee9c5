"""The list of recordings: moshi-finetune's jsonl."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from .problems import check_each


@dataclass(frozen=True)
class Clip:
    """One line of a manifest.

    Attributes:
        name: the path as the manifest has it.
        path: of the sound file.
        duration: in seconds, as the manifest says.
        where: `file:line`, for messages.
    """

    name: str
    path: Path
    duration: float
    where: str

    @property
    def transcript(self) -> Path:
        """The transcript's file: beside the sound file, with the suffix `.json`."""
        return self.path.with_suffix(".json")


def read_manifest(path: Path | str) -> list[Clip]:
    """Read a manifest: one `{"path": "a.wav", "duration": 24.52}` per line.

    Relative paths start at the manifest's folder. Empty lines and other keys are passed over.

    Raises:
        FileNotFoundError: there is no such manifest.
        ValueError: lines are not what they should be, a sound file or a transcript does not exist,
            or there is no line at all; the message names `file:line` and the field.
    """
    path = Path(path)
    lines = enumerate(path.read_bytes().splitlines(), start=1)
    numbered = [(f"{path}:{number}", line) for number, line in lines if line.strip()]
    if not numbered:
        raise ValueError(f"{path} is empty: a data set needs at least one recording")
    return check_each(numbered, lambda entry: _clip(path.parent, *entry))


def _clip(folder: Path, where: str, line: bytes) -> Clip:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: must be a JSON object, got {line[:80]!r} ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: must be a JSON object, got {line[:80]!r}")
    for key in ("path", "duration"):
        if key not in fields:
            raise ValueError(f"{where}: the field {key!r} is missing")
    name, duration = fields["path"], fields["duration"]
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: path must be the name of a WAV file, got {name!r}")
    if isinstance(duration, bool) or not isinstance(duration, int | float):
        raise ValueError(f"{where}: duration must be a number of seconds, got {duration!r}")
    if not 0 < duration <= sys.float_info.max:
        raise ValueError(
            f"{where}: duration must be finite and above 0 seconds, got {duration!r:.20}"
        )
    clip = Clip(name, folder / name, float(duration), where)
    if not clip.path.is_file():
        raise ValueError(f"{where}: path: there is no file {clip.path}")
    if not clip.transcript.is_file():
        raise ValueError(f"{where}: path: {clip.path} has no transcript {clip.transcript}")
    return clip
