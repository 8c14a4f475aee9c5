"""What the user asks the benchmark for, checked before anything slow happens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ttt_cache.checks import device_here, one_of, seed_of, threads_here, whole_number
from ttt_cache.config import CacheConfig

from .core import MOSHI, Widths

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BATCHES = {"cpu": (1, 4), "cuda": (1, 8, 32, 64)}
CONTEXTS = (3000, 8000)  # of stock Moshi, and of a ring that was made longer
LEAST = 3  # samples that have a median worth the name


@dataclass(frozen=True)
class Plan:
    """A benchmark that can be run.

    Attributes:
        batches: conversations at once, one run of all arms for each.
        contexts: frames in the rings of stock Moshi.
        recent, virtual, chunk: of the patched arms, N, M and C.
        repetitions: samples of each arm, each a whole chunk of steps.
        seed: of weights and frames.
        out: folder of the results.
        widths: of the layer.
    """

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    recent: int
    virtual: int
    dtype: torch.dtype
    device: torch.device
    threads: int
    repetitions: int
    seed: int
    out: Path
    chunk: int = CacheConfig.chunk
    widths: Widths = MOSHI

    @property
    def check_steps(self) -> int:
        """Steps that the arms are compared over: past the first eviction, and four versions."""
        return self.recent + 5 * self.chunk


def make_plan(
    batches: Sequence[int] | None = None,
    contexts: Sequence[int] = CONTEXTS,
    recent: int = 100,
    virtual: int = 10,
    dtype: str | None = None,
    device: str | None = None,
    threads: int = 1,
    repetitions: int = 15,
    seed: int = 0,
    out: Path = Path("out/bench"),
) -> Plan:
    """Check every choice; nothing is written yet.

    Raises:
        TypeError, ValueError: a choice is not possible; the message names it.
    """
    here = _device(device)
    recent = whole_number("--recent", recent, 1)
    least = recent + CacheConfig.chunk - 1
    name = dtype or ("float32" if here.type == "cpu" else "bfloat16")
    return Plan(
        batches=_each("--batch", BATCHES[here.type] if batches is None else batches, 1),
        contexts=_each("--context", contexts, least),
        recent=recent,
        virtual=whole_number("--virtual", virtual, 1),
        dtype=DTYPES[one_of("--dtype", name, tuple(DTYPES))],
        device=here,
        threads=threads_here("--threads", threads),
        repetitions=whole_number("--repetitions", repetitions, LEAST),
        seed=seed_of("--seed", seed),
        out=out,
    )


def _each(name: str, values: Iterable[int], least: int) -> tuple[int, ...]:
    """Whole numbers in their order, each once."""
    found = sorted({whole_number(name, value, least) for value in values})
    if not found:
        raise ValueError(f"{name} must name at least one number")
    return tuple(found)


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.device_count() else "cpu"
    return torch.device(device_here("--device", name))
