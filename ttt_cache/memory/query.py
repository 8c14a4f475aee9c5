"""A token asks the memory itself: the query of a TTT layer, and the way back to the model's width.

"Learning to (Learn at Test Time)", arXiv 2407.04620, equation 5: `z = f(theta_Q x; W)`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Frames, by_column
from .network import unit
from .ttt import TTT


class QueryReader(nn.Module):
    """Projects queries into a memory's width and its answers out again.

    The way out starts at zero, so that a new memory adds nothing; the way in starts random.

    Args:
        width_in: width of what a token asks with, `|a|`.
        source: what that is: the hidden state, the query of the attention, or its output.
        latent_dim: width of queries and answers, E.
        num_heads, head_dim: of the attention: H, D.
    """

    def __init__(
        self, width_in: int, source: str, latent_dim: int, num_heads: int, head_dim: int, **factory
    ) -> None:
        super().__init__()
        self.source, self.num_heads = source, num_heads
        project = torch.randn(width_in, latent_dim, **factory) / width_in**0.5
        self.project = nn.Parameter(by_column(project))
        self.to_output = nn.Parameter(torch.zeros(latent_dim, num_heads * head_dim, **factory))

    def queries(self, memory: TTT, frames: Frames) -> Tensor:
        """Unit queries `[B, h, T, d]` of T tokens, float32 or wider."""
        asked = frames.asked(self.source)
        asked = memory.finite(asked.to(self.project.dtype) @ self.project)
        return unit(memory.split_heads(asked))

    def output(self, answers: Tensor, dtype: torch.dtype) -> Tensor:
        """`[B, T, E]` -> what the memory adds to each head, `[B, H, T, D]`."""
        out = answers.to(dtype) @ self.to_output.to(dtype)
        return out.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
