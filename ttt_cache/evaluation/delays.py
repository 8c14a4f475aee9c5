"""Codes of conversations that go on, delayed as `LMModel.forward` delays those of a whole one."""

from __future__ import annotations

import torch
from torch import Tensor

from ttt_cache.training.data import LMFacts


class Delays:
    """What the next frames of B conversations need of those before them.

    Args:
        rows: B.
    """

    def __init__(self, facts: LMFacts, rows: int, device: torch.device | str = "cpu") -> None:
        self.facts, self.longest = facts, max(facts.delays)
        initial = torch.tensor(facts.initial, device=device)
        self._initial = initial[None, :, None].expand(rows, -1, self.longest + 1)
        self._past = self._initial  # the last frames, not delayed, `[B, K, longest delay + 1]`

    def take(self, codes: Tensor, fresh: Tensor | None = None) -> Tensor:
        """The next frames.

        Args:
            codes: not delayed, int64 `[B, K, S]`.
            fresh: bool `[B]`: rows that begin a conversation; none by default.

        Returns:
            `[B, K, S + 1]`, as `LMFacts.delayed`: column t is the model's input at frame t, column
            t + 1 what it should predict.
        """
        past = self._past
        if fresh is not None:
            past = torch.where(fresh.to(past.device)[:, None, None], self._initial, past)
        whole = torch.cat([past, codes.to(past)], dim=2)
        self._past = whole[:, :, -past.shape[2] :]
        columns = whole.shape[2] - self.longest
        lines = [
            whole[:, stream, self.longest - delay : self.longest - delay + columns]
            for stream, delay in enumerate(self.facts.delays)
        ]
        return torch.stack(lines, dim=1)
