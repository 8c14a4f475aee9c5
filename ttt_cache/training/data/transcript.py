"""What is said, by whom and when: the transcript beside a sound file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

MAIN = "SPEAKER_MAIN"
SLACK = 1.0  # seconds that an aligner may be off at either end of the sound


class Word(NamedTuple):
    """One entry of `alignments`; times in seconds."""

    text: str
    start: float
    end: float
    speaker: str


def read_transcript(path: Path, seconds: float) -> list[Word]:
    """Read `{"alignments": [["word", [start, end], "SPEAKER_MAIN"], ...]}`.

    Args:
        path: of the transcript.
        seconds: how long the recording is.

    Returns:
        All words of all speakers, by time.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not of this form, a word ends before it starts, or is more than a second
            outside of the recording; the message names the file and the entry.
    """
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: must be JSON: {error}") from None
    entries = content.get("alignments") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: must be an object with a list 'alignments'")
    words = [_word(f"{path}: alignments[{i}]", entry) for i, entry in enumerate(entries)]
    for number, word in enumerate(words):
        if word.end < word.start:
            raise ValueError(
                f"{path}: alignments[{number}]: {word.text!r} ends at {word.end:g} s, before it "
                f"starts at {word.start:g} s"
            )
        if word.start < -SLACK or word.end > seconds + SLACK:
            raise ValueError(
                f"{path}: alignments[{number}]: {word.text!r} is said from {word.start:g} to "
                f"{word.end:g} s, but the recording has {seconds:.2f} s: the transcript is of "
                "another recording"
            )
    return sorted(words, key=lambda word: word.start)


def _word(where: str, entry: Any) -> Word:
    match entry:
        case [str(text), [start, end], str(speaker)] if _is_time(start) and _is_time(end):
            return Word(text, float(start), float(end), speaker)
    raise ValueError(f'{where}: must be ["word", [start, end], "speaker"], got {entry!r}')


def _is_time(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)
