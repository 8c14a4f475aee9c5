"""What the user asks the demo for, checked before anything slow happens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ttt_cache.checks import between, device_here, seed_of, threads_here

from .story import LEAST

MOST_FRAMES = 100_000  # two hours of conversation; the full cache keeps them all


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
    between("--frames", frames, LEAST, MOST_FRAMES)
    seed_of("--seed", seed)
    threads_here("--threads", threads)
    return Plan(frames, seed, threads, _device(device), out)


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.device_count() else "cpu"
    return device_here("--device", name)
