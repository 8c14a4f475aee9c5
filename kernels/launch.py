"""A kernel with everything that it is started with, so that tests compile what the GPU will run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Launch:
    """One start of a Triton kernel.

    Attributes:
        kernel: a function under `triton.jit`.
        grid: programs along each of up to three axes.
        arguments: every argument by name, constants included.
        options: `num_warps`, `num_stages`; chosen from shapes, never by trying (autotuning would
            run and measure inside a CUDA graph).
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    options: Mapping[str, int] = field(default_factory=dict)

    def run(self) -> None:
        """Start it on the current stream."""
        self.kernel[self.grid](**self.arguments, **self.options)
