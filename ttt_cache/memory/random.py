"""M fixed random tokens, the same for every input: a memory that remembers nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import widened
from .base import Frames, Memory, MemoryState


class Random(Memory):
    """A control: the latents never change, and the same trained maps read them as any memory's.

    Args:
        slots: virtual tokens, M.
        latent_dim: width of a latent, as the memory that it is compared with.
    """

    width = 0
    latents: Tensor

    def __init__(self, slots: int, latent_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.register_buffer("latents", torch.randn(slots, latent_dim, device=device, dtype=dtype))

    def features(self, frames: Frames) -> Tensor:
        return frames.x[..., :0]

    def initial(self, batch_size: int) -> MemoryState:
        return {}

    def take(self, state: MemoryState, token: Tensor) -> None:
        pass

    def scan(
        self, state: MemoryState, tokens: Tensor, valid: Tensor, closes: Tensor
    ) -> tuple[MemoryState, MemoryState]:
        return {}, state

    def read(self, state: MemoryState, batch_size: int) -> Tensor:
        return widened(self.latents).expand(batch_size, -1, -1)
