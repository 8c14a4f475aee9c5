"""All that can be wrong with recordings, found before hours go into tokenising them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .manifest import Clip
from .problems import check_each
from .transcript import MAIN, read_transcript
from .wav import Wav

TOLERANCE = 0.01  # seconds beyond one frame that a manifest's duration may be off


@dataclass(frozen=True)
class Recording:
    """A clip that has been checked.

    Attributes:
        name: the path as the manifest has it.
        wav: the header of its sound file.
        transcript: the file with its words.
        digest: of that file.
        speakers: who speaks in it.
    """

    name: str
    wav: Wav
    transcript: Path
    digest: str
    speakers: frozenset[str]


def check_clips(
    clips: Iterable[Clip], sample_rate: int, frame_rate: float, channels: int
) -> list[Recording]:
    """Check the headers of all sound files, and all transcripts.

    Args:
        clips: what a manifest lists.
        sample_rate: in Hz, as Mimi wants it.
        frame_rate: Mimi's frames per second.
        channels: 2; or 1 for a model of one voice, which takes the left channel of two as well.

    Raises:
        ValueError: something is wrong; the message names files and fields, ten at most.
    """

    def check(clip: Clip) -> Recording:
        wav = _sound(clip, sample_rate, channels)
        if abs(wav.seconds - clip.duration) > 1 / frame_rate + TOLERANCE:
            raise ValueError(
                f"{clip.where}: duration is {clip.duration:g} s, {clip.path} has "
                f"{wav.seconds:.3f} s: the manifest is of another file"
            )
        words = read_transcript(clip.transcript, wav.seconds)
        digest = hashlib.sha256(clip.transcript.read_bytes()).hexdigest()
        speakers = frozenset(word.speaker for word in words)
        return Recording(clip.name, wav, clip.transcript, digest, speakers)

    recordings = check_each(clips, check)
    _someone_speaks(recordings)
    return recordings


def _sound(clip: Clip, sample_rate: int, channels: int) -> Wav:
    wav = Wav.open(clip.path)
    if wav.rate != sample_rate:
        raise ValueError(
            f"{clip.path}: the rate must be {sample_rate} Hz, got {wav.rate} Hz: resample it"
        )
    if wav.channels not in {channels, 2}:
        wanted = "2 channels (left Moshi, right the user)" if channels == 2 else "1 or 2 channels"
        raise ValueError(f"{clip.path}: must have {wanted}, got {wav.channels}")
    if not wav.samples:
        raise ValueError(f"{clip.path}: holds no sound, 0 samples")
    return wav


def _someone_speaks(recordings: Sequence[Recording]) -> None:
    heard = frozenset[str]().union(*(recording.speakers for recording in recordings))
    if MAIN not in heard:
        raise ValueError(
            f"no transcript has a word of {MAIN}, the speaker of the left channel, so there is no "
            f"text to learn; the speakers are {', '.join(sorted(heard)) or 'none'}"
        )
