"""Virtual tokens: how queries are scored against read-outs, and what they bring back.

With latent read-outs `r_m` of width E, `K_m = W_K r_m + key_m` and `V_m = W_V r_m` for each key
head. So `q . K_m = (W_K^T q) . r_m + q . key_m` and `sum_m p_m V_m = W_V (sum_m p_m r_m)`: keys and
values at model width need not be built. DeepSeek-V2 (arXiv 2405.04434, section 2.1.2) absorbs its
low-rank key-value projections in the same way.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..product import last_product
from .base import by_column

DECAY_START = math.log(math.expm1(0.1))  # softplus of it is 0.1 for each slot of age


class VirtualTokens(nn.Module, abc.ABC):
    """Reads M virtual tokens.

    Attributes:
        slots: number of virtual tokens, M.
        joint_bias: where the bias of the joint gate starts.
    """

    slots: int
    joint_bias: float

    @abc.abstractmethod
    def score(self, q: Tensor, readout: Tensor) -> Tensor:
        """Scores of queries against virtual tokens, scaled by `1 / sqrt(D)`.

        Args:
            q: queries before RoPE, `[B, Hkv, R, G, L, D]`: R query heads per key head, and G groups
                of L queries; a group shares its read-outs.
            readout: `[B, G, V, *]`: the V memory versions that a group may see.

        Returns:
            `[B, Hkv, R, G, L, V * M]`.
        """

    @abc.abstractmethod
    def mix(self, weights: Tensor, readout: Tensor) -> Tensor:
        """Weighted sum of virtual values: `[B, Hkv, R, G, L, V * M]` -> `[B, Hkv, R, G, L, D]`."""


class LatentTokens(VirtualTokens):
    """Virtual tokens from read-outs `[B, M, E]`, float32 or wider.

    Values start at zero, so that a new memory adds nothing; keys start random, so that gradients
    reach everything (never zero both factors of a product).

    Args:
        slots: virtual tokens, M.
        latent_dim: width of a read-out, E.
        num_heads, kv_heads, head_dim: of the attention: H, Hkv, D.
        position: `none`, `slot` (arXiv 1910.10683) or `decay` (arXiv 2108.12409).
    """

    joint_bias = -2.0

    def __init__(
        self,
        slots: int,
        latent_dim: int,
        num_heads: int,
        kv_heads: int,
        head_dim: int,
        position: str,
        **factory,
    ) -> None:
        super().__init__()
        self.slots, self.position = slots, position
        self.scale = 1 / math.sqrt(head_dim)
        key = torch.randn(kv_heads, head_dim, latent_dim, **factory) / math.sqrt(latent_dim)
        self.to_key = nn.Parameter(key)
        self.to_value = nn.Parameter(torch.zeros(kv_heads, latent_dim, head_dim, **factory))
        slot_key = torch.zeros(kv_heads, head_dim, slots, **factory)
        self.slot_key = nn.Parameter(by_column(slot_key))
        if position == "slot":
            self.slot_bias = nn.Parameter(torch.zeros(num_heads, slots, **factory))
        if position == "decay":
            self.decay = nn.Parameter(torch.full((num_heads,), DECAY_START, **factory))

    def score(self, q: Tensor, readout: Tensor) -> Tensor:
        q = q * self.scale
        latents = readout.flatten(2, 3).to(q.dtype)  # [B, G, V * M, E]
        absorbed = matmul_heads(q, self.to_key.to(q.dtype))  # [B, Hkv, R, G, L, E]
        scores = matmul_groups(absorbed, latents.transpose(-1, -2))
        slots = matmul_heads(q, self.slot_key.to(q.dtype))  # [B, Hkv, R, G, L, M]
        if self.position != "none":
            slots = slots + self.bias().view(*q.shape[1:3], 1, 1, -1).to(q.dtype)
        by_version = scores.unflatten(-1, (readout.shape[2], self.slots))
        return (by_version + slots.unsqueeze(-2)).flatten(-2)

    @property
    def of_tokens(self) -> list[Tensor]:
        """The weights that virtual keys and values are made with."""
        return [self.to_key, self.to_value, self.slot_key]

    def make(self, tokens: dict[str, Tensor], readout: Tensor) -> None:
        """Keys and values `[B, Hkv, M, D]` of read-outs `[B, M, E]`, in place, beside the latter.

        For whoever reads them so often that building them is cheaper.
        """
        keys, values = tokens["keys"], tokens["values"]
        latents = readout[:, None].to(keys.dtype).expand(-1, keys.shape[1], -1, -1)
        to_key, slot_key = (w.to(keys.dtype).transpose(1, 2) for w in (self.to_key, self.slot_key))
        torch.add(matmul_heads(latents, to_key), slot_key, out=keys)
        values.copy_(matmul_heads(latents, self.to_value.to(values.dtype)))
        tokens["readout"].copy_(readout)  # last: then they are whole

    def score_made(self, q: Tensor, keys: Tensor) -> Tensor:
        """As `score`, for one query `[B, Hkv, R, D]` of each head: `[B, Hkv, R, M]`."""
        scores = (keys @ (q * self.scale).transpose(-1, -2)).transpose(-1, -2)
        if self.position == "none":
            return scores
        return scores + self.bias().view(*q.shape[1:3], -1).to(q.dtype)

    def mix(self, weights: Tensor, readout: Tensor) -> Tensor:
        latents = readout.flatten(2, 3).to(weights.dtype)
        to_value = self.to_value.to(weights.dtype)
        return matmul_heads(matmul_groups(weights, latents), to_value, last_product)

    def bias(self) -> Tensor:
        """What a slot's place adds to its scores, `[H, M]`, the same at any time."""
        if self.position == "slot":
            return self.slot_bias
        age = torch.arange(self.slots - 1, -1, -1, device=self.decay.device)
        return -torch.nn.functional.softplus(self.decay)[:, None] * age


class PlainTokens(VirtualTokens):
    """Virtual tokens that are keys and values, no training needed.

    Read-outs are `[B, Hkv, M, 2 D + 1]`: key before RoPE, value, and how many tokens this one
    stands for, whose logarithm is added to its score.
    """

    joint_bias = 0.0

    def __init__(self, slots: int, head_dim: int) -> None:
        super().__init__()
        self.slots = slots
        self.scale = 1 / math.sqrt(head_dim)

    def score(self, q: Tensor, readout: Tensor) -> Tensor:
        keys, _, members = self._split(readout)
        scores = (q * self.scale) @ keys.to(q.dtype).transpose(-1, -2)
        return scores + members.log().transpose(-1, -2).to(q.dtype)

    def mix(self, weights: Tensor, readout: Tensor) -> Tensor:
        _, values, _ = self._split(readout)
        return weights @ values.to(weights.dtype)

    @staticmethod
    def _split(readout: Tensor) -> tuple[Tensor, ...]:
        """`[B, G, V, Hkv, M, 2 D + 1]` -> keys, values and counts, `[B, Hkv, 1, G, V * M, *]`."""
        tokens = readout.permute(0, 3, 1, 2, 4, 5).flatten(3, 4).unsqueeze(2)
        width = readout.shape[-1] // 2
        return tokens.split([width, width, 1], dim=-1)


def matmul_heads(
    x: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor] = torch.bmm
) -> Tensor:
    """`[B, Hkv, *, D] @ [Hkv, D, E]` -> `[B, Hkv, *, E]`, one matrix per key head.

    Rows are folded into one product per head: broadcasting would copy the matrices for each row.
    """
    by_head = x.transpose(0, 1)
    made = product(by_head.flatten(1, -2), weight)
    return made.unflatten(1, by_head.shape[1:-1]).transpose(0, 1)


def matmul_groups(x: Tensor, matrices: Tensor) -> Tensor:
    """`[B, Hkv, R, G, L, I] @ [B, G, I, J]` -> `[B, Hkv, R, G, L, J]`, one matrix per group.

    Heads are folded into the rows of one product: broadcasting would copy the matrices for each.
    They stand innermost, where a product by heads can take a row of each without a copy.
    """
    by_group = x.permute(0, 3, 4, 1, 2, 5)  # [B, G, L, Hkv, R, I]
    made = torch.bmm(by_group.flatten(2, 4).flatten(0, 1), matrices.flatten(0, 1))
    return made.view(*by_group.shape[:-1], -1).permute(0, 3, 4, 1, 2, 5)
