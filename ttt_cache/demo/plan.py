"""What the user asks the demo for, checked before anything slow happens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttt_cache.checks import whole_number
from ttt_cache.config import CacheConfig

from .clip import read_clip

MOST_FRAMES = 10_000_000  # nine days of conversation
LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Plan:
    """A demo that can be run.

    Attributes:
        name: of the clip.
        clip: samples at 24 kHz, float32 [1, 1, T].
        frames: length of the conversation, 80 ms each.
        out: folder of the results; see `make_folder`.
    """

    name: str
    clip: Tensor
    frames: int
    config: CacheConfig
    depformer: bool
    seed: int
    threads: int
    device: str
    out: Path

    def resolved(self, config: CacheConfig) -> Plan:
        """The plan with the settings as the patch has them: layers counted."""
        return replace(self, config=config)


def make_plan(
    wav: Path | None,
    frames: int,
    settings: Mapping[str, Any],
    depformer: bool = False,
    seed: int = 0,
    threads: int = 1,
    device: str | None = None,
    out: Path = Path("out/demo"),
) -> Plan:
    """Check every choice and read the clip; nothing is written yet.

    Raises:
        TypeError, ValueError: a choice is not possible; the message names it.
    """
    _between("--frames", frames, 1, MOST_FRAMES)
    _between("--threads", threads, 1, os.cpu_count() or 1)
    _between("--seed", seed, 0, LARGEST_SEED)
    config = CacheConfig.from_fields(settings)
    device = _device(device)
    clip = read_clip(wav)
    return Plan(
        name="speech.wav (in the package)" if wav is None else wav.name,
        clip=clip,
        frames=frames,
        config=config,
        depformer=depformer,
        seed=seed,
        threads=threads,
        device=device,
        out=out,
    )


def _between(name: str, value: int, least: int, most: int) -> None:
    if whole_number(name, value, least) > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


def _device(name: str | None) -> str:
    number = torch.cuda.device_count()
    there = ["cpu", *(["cuda"] if number else []), *(f"cuda:{index}" for index in range(number))]
    if name is None:
        return "cuda" if number else "cpu"
    if name not in there:
        raise ValueError(
            f"--device must be one of {', '.join(there)} on this machine, got {name!r}"
        )
    return name


def make_folder(out: Path) -> None:
    """Make the folder of the results, before the time is spent that makes them.

    Raises:
        ValueError: it cannot be made, or not be written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out must be a folder, got {out}: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise ValueError(f"--out must be a folder that can be written to, got {out}")
