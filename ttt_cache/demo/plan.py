"""What the user asks the demo for, checked before anything slow happens."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ttt_cache.checks import device_here, whole_number

from .story import LEAST

MOST_FRAMES = 100_000  # two hours of conversation; the full cache keeps them all
LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Plan:
    """A demo that can be run.

    Attributes:
        frames: length of the conversations, 80 ms each.
        seed: of what is told and said in them.
        out: folder of the results.
    """

    frames: int
    seed: int
    threads: int
    device: str
    out: Path


def make_plan(
    frames: int,
    seed: int = 0,
    threads: int = 1,
    device: str | None = None,
    out: Path = Path("out/demo"),
) -> Plan:
    """Check every choice; nothing is written yet.

    Raises:
        TypeError, ValueError: a choice is not possible; the message names it.
    """
    _between("--frames", frames, LEAST, MOST_FRAMES)
    _between("--seed", seed, 0, LARGEST_SEED)
    _between("--threads", threads, 1, os.cpu_count() or 1)
    return Plan(frames, seed, threads, _device(device), out)


def _between(name: str, value: int, least: int, most: int) -> None:
    if whole_number(name, value, least) > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.device_count() else "cpu"
    return device_here("--device", name)
