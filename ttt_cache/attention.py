"""Dual-softmax gated attention: how the recent window and the memory share a query.

The plain-PyTorch reference. Over virtual tokens it works on scores and answers with weights, so
that the caller decides how values are laid out (a ring, blocks of a sequence, latent read-outs).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .precision import widened

# A new gate leaves the layer close to its recent window, but far enough from saturation to learn:
# these start with 2% for the memory; where joint starts is up to its virtual tokens.
OPEN_LOGIT = 4.0
RESIDUAL_SCALE = 0.1  # as in TTT-Video, arXiv 2504.05298


class Gate(nn.Module):
    """Mixes window and memory, per query and head.

    `output = alpha * softmax(recent) V + (1 - alpha) * memory`, where the memory may be an
    attention of its own, `softmax(virtual) V_virtual`, with

    | kind       | alpha                                                                         |
    |------------|-------------------------------------------------------------------------------|
    | `joint`    | `sigmoid(lse(recent) - lse(virtual) - b)`, `b` per head: one softmax over both |
    | `fixed`    | the given constant                                                            |
    | `layer`    | sigmoid of a learned scalar                                                   |
    | `head`     | sigmoid of a learned scalar per head                                          |
    | `query`    | sigmoid of a learned linear function of the query before RoPE                 |
    | `residual` | no alpha: `recent + tanh(a) * memory`, `a` per head (arXiv 2504.05298)        |

    Where the memory is not written the output is exactly that of the window. `joint` needs virtual
    tokens.

    Args:
        kind: one of `ttt_cache.config.GATES`.
        num_heads: query heads, H.
        head_dim: width of a head, D.
        alpha: the constant of `fixed`.
        joint_bias: where the bias of `joint` starts.
    """

    def __init__(
        self,
        kind: str,
        num_heads: int,
        head_dim: int,
        alpha: float,
        joint_bias: float,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.kind, self.alpha = kind, alpha
        start = {"joint": joint_bias, "residual": RESIDUAL_SCALE}.get(kind, OPEN_LOGIT)
        size = {"fixed": 0, "layer": 1}.get(kind, num_heads)
        factory = {"device": device, "dtype": dtype}
        if size:
            self.bias = nn.Parameter(torch.full((size,), start, **factory))
        if kind == "query":
            self.weight = nn.Parameter(torch.zeros(num_heads, head_dim, **factory))

    def forward(
        self, recent: Tensor, virtual: Tensor, written: Tensor, q: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weights over recent and virtual tokens, in the dtype of `q`.

        Args:
            recent: scores `[B, Hkv, R, T, L]`, -inf where a query may not look, but not all.
            virtual: scores `[B, Hkv, R, T, M]`, likewise.
            written: bool `[B, 1, 1, T, 1]`, whether the query sees any virtual token.
            q: queries before RoPE, `[B, Hkv, R, T, D]`.
        """
        dtype = q.dtype
        recent, virtual = widened(recent), widened(virtual)
        if self.kind == "joint":
            # -inf plus the bias stays -inf: a memory that is not written takes no mass.
            both = torch.cat([recent, virtual + self._per_head(q).to(virtual.dtype)], dim=-1)
            weights = torch.softmax(both, dim=-1).to(dtype)
            on_recent, on_virtual = weights.split([recent.shape[-1], virtual.shape[-1]], dim=-1)
            return on_recent, on_virtual
        on_recent = torch.softmax(recent, dim=-1)
        on_virtual = torch.softmax(virtual.masked_fill(~written, 0), dim=-1)
        of_recent, of_memory = self.shares(written, q)
        return (of_recent * on_recent).to(dtype), (of_memory * on_virtual).to(dtype)

    def shares(self, written: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """What the outputs of window and memory are multiplied by; not for `joint`.

        Args:
            written: bool `[B, 1, 1, T, 1]`, whether the query reads the memory.
            q: queries before RoPE, `[B, Hkv, R, T, D]`.

        Returns:
            two tensors that broadcast over `[B, Hkv, R, T, *]`, float32 or wider.
        """
        one = widened(q.new_ones(()))
        if self.kind == "residual":
            return one, torch.tanh(widened(self._per_head(q))) * written
        # A tensor: of two Python numbers `where` would make float32, too narrow for float64.
        alpha = torch.where(written, self._alpha(q), one)
        return alpha, 1 - alpha

    def _alpha(self, q: Tensor) -> Tensor | float:
        if self.kind == "fixed":
            return self.alpha
        logit = self._per_head(q)
        if self.kind == "query":
            weight = self.weight.view(q.shape[1], q.shape[2], 1, -1).to(q.dtype)
            logit = logit + (q * weight).sum(-1, keepdim=True)
        return torch.sigmoid(widened(logit))

    def _per_head(self, q: Tensor) -> Tensor:
        """The learned scalars as `[Hkv, R, 1, 1]`, or `[1, 1, 1, 1]` for one per layer."""
        heads = (1, 1) if self.kind == "layer" else q.shape[1:3]
        return self.bias.view(*heads, 1, 1)


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last axis, computed in float32 or wider, in the dtype of `scores`."""
    return torch.softmax(widened(scores), dim=-1).to(scores.dtype)
