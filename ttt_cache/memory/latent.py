"""Virtual keys and values as linear maps of small latent read-outs, absorbed into the query.

With read-outs `r_m` of width E, `K_m = W_K r_m + key_m` and `V_m = W_V r_m` for each key head. So
`q . K_m = (W_K^T q) . r_m + q . key_m` and `sum_m p_m V_m = W_V (sum_m p_m r_m)`: keys and values
at model width are never built. DeepSeek-V2 (arXiv 2405.04434, section 2.1.2) absorbs its low-rank
key-value projections in the same way.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .base import Memory, matmul_heads


class LatentMemory(Memory):
    """Base of memories whose read-out is `[B, M, E]` latents, float32 or wider.

    Values start at zero, so that a new memory adds nothing; keys start random, so that gradients
    reach everything (never zero both factors of a product).

    Args:
        slots: virtual tokens, M.
        latent_dim: width of a read-out, E.
        kv_heads: key heads of the attention.
        head_dim: width of an attention head, D.
    """

    def __init__(
        self, slots: int, latent_dim: int, kv_heads: int, head_dim: int, **factory
    ) -> None:
        super().__init__()
        self.slots = slots
        self.latent_dim = latent_dim
        self.scale = 1 / math.sqrt(head_dim)
        key = torch.randn(kv_heads, head_dim, latent_dim, **factory) / math.sqrt(latent_dim)
        self.to_key = nn.Parameter(key)
        self.to_value = nn.Parameter(torch.zeros(kv_heads, latent_dim, head_dim, **factory))
        self.slot_key = nn.Parameter(torch.zeros(kv_heads, head_dim, slots, **factory))

    def score(self, q: Tensor, readout: Tensor) -> Tensor:
        q = q * self.scale
        latents = readout.flatten(2, 3).to(q.dtype)  # [B, G, V * M, E]
        absorbed = matmul_heads(q, self.to_key.to(q.dtype))  # [B, Hkv, R, G, L, E]
        scores = absorbed @ latents.transpose(-1, -2)[:, None, None]
        slots = matmul_heads(q, self.slot_key.to(q.dtype))  # [B, Hkv, R, G, L, M]
        return scores + slots.repeat(1, 1, 1, 1, 1, readout.shape[2])

    def mix(self, weights: Tensor, readout: Tensor) -> Tensor:
        latents = readout.flatten(2, 3).to(weights.dtype)
        return matmul_heads(weights @ latents[:, None, None], self.to_value.to(weights.dtype))
