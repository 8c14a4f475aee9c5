"""WAV files: the header, and any part of the samples without the rest."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
KINDS = {(PCM, 8), (PCM, 16), (PCM, 24), (PCM, 32), (FLOAT, 32), (FLOAT, 64)}


@dataclass(frozen=True)
class Wav:
    """What the header of a WAV file says.

    Attributes:
        path: of the file.
        rate: in Hz.
        channels: their number.
        samples: per channel.
        kind: PCM or float, and bits per sample.
        offset: of the first sample, in bytes.
    """

    path: Path
    rate: int
    channels: int
    samples: int
    kind: tuple[int, int]
    offset: int

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return self.samples / self.rate

    @classmethod
    def open(cls, path: Path) -> Wav:
        """Read the header of a file.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is no WAV of integers or floats, or is cut off; the message names it.
        """
        with path.open("rb") as file:
            start = file.read(12)
            if start[:4] != b"RIFF" or start[8:] != b"WAVE":
                raise ValueError(f"{path}: must be a WAV file, it starts with {start!r}")
            layout = None
            while len(head := file.read(8)) == 8:
                name, size = struct.unpack("<4sI", head)
                if name == b"data" and layout is not None:
                    return cls._with(path, layout, size, file)
                body = file.read(size + size % 2)
                layout = body if name == b"fmt " and size >= 16 else layout
        raise ValueError(f"{path}: is a damaged WAV file: it has no 'fmt ' and 'data' chunks")

    @classmethod
    def _with(cls, path: Path, layout: bytes, size: int, file: BinaryIO) -> Wav:
        tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", layout[:16])
        if tag == EXTENSIBLE and len(layout) >= 26:
            tag = int.from_bytes(layout[24:26], "little")
        if (tag, bits) not in KINDS or not channels or not rate:
            raise ValueError(
                f"{path}: must hold integers of 8, 16, 24 or 32 bits or floats of 32 or 64, got "
                f"format {tag} with {bits} bits, {channels} channels at {rate} Hz"
            )
        there = path.stat().st_size - file.tell()
        if size > there:
            raise ValueError(
                f"{path}: is cut off: the header announces {size} bytes of sound, {there} are there"
            )
        samples = size // (channels * bits // 8)
        return cls(path, rate, channels, samples, (tag, bits), file.tell())

    def read(self, start: int, count: int) -> np.ndarray:
        """Read `count` samples from sample `start` on, float32 `[channels, count]` in -1 .. 1.

        Raises:
            OSError: the file cannot be read.
            ValueError: a sample is NaN or infinite, or the file has become shorter.
        """
        tag, bits = self.kind
        width = self.channels * bits // 8
        with self.path.open("rb") as file:
            file.seek(self.offset + start * width)
            raw = np.frombuffer(file.read(count * width), np.uint8)
        if len(raw) < count * width:
            raise ValueError(f"{self.path}: has become shorter since it was checked")
        samples = _floats(raw, bits) if tag == FLOAT else _integers(raw, bits)
        if not np.isfinite(samples).all():
            raise ValueError(f"{self.path}: holds samples that are NaN or infinite")
        return np.ascontiguousarray(samples.reshape(count, self.channels).T)


def _floats(raw: np.ndarray, bits: int) -> np.ndarray:
    return raw.view(f"<f{bits // 8}").astype(np.float32)


def _integers(raw: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:  # the only ones without a sign
        return (raw.astype(np.float32) - 128) / 128
    if bits == 24:
        wide = np.zeros((len(raw) // 3, 4), np.uint8)
        wide[:, 1:] = raw.reshape(-1, 3)
        raw, bits = wide.reshape(-1), 32
    return raw.view(f"<i{bits // 8}").astype(np.float32) / 2.0 ** (bits - 1)
