"""A kernel with everything that it is started with, so that tests compile what the GPU will run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


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
        """Start it where its tensors are, on the current stream there."""
        with self._device():
            self.kernel[self.grid](**self.arguments, **self.options)

    def _device(self) -> AbstractContextManager:
        # Triton starts kernels on the current device, which need not be that of the tensors.
        for given in self.arguments.values():
            one = given[0] if isinstance(given, tuple) else given
            if isinstance(one, Tensor) and one.is_cuda:
                return torch.cuda.device(one.device)
        return nullcontext()
