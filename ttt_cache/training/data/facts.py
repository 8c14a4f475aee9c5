"""What the data must know of the language model that it is made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moshi.models.lm import LMModel


@dataclass(frozen=True)
class LMFacts:
    """How a language model wants its codes: K = 1 + n_q streams, text first.

    Attributes:
        n_q: audio codebooks that the model hears.
        dep_q: audio codebooks that it says; `n_q == dep_q` for models of one voice.
        card, text_card: number of audio and of text tokens.
        delays: frames by which each of the K streams is late.
        initial: the token of each stream before its first code.
        zero: the token that is neither embedded nor predicted.
        text_padding: the text token of a frame without text.
        end_of_text_padding: the text token of the last frame before a word.
    """

    n_q: int
    dep_q: int
    card: int
    text_card: int
    delays: tuple[int, ...]
    initial: tuple[int, ...]
    zero: int
    text_padding: int
    end_of_text_padding: int

    @classmethod
    def of(cls, lm: LMModel) -> LMFacts:
        """The facts of a model.

        Raises:
            ValueError: it neither says all that it hears (`n_q == dep_q`) nor half of it.
        """
        if lm.dep_q < 1 or lm.n_q not in (lm.dep_q, 2 * lm.dep_q):
            raise ValueError(
                f"the model's n_q must be dep_q (one voice) or twice dep_q (Moshi and the user), "
                f"got n_q {lm.n_q} and dep_q {lm.dep_q}"
            )
        return cls(
            n_q=lm.n_q,
            dep_q=lm.dep_q,
            card=lm.card,
            text_card=lm.text_card,
            delays=tuple(lm.delays),
            initial=(lm.text_initial_token_id, *[lm.initial_token_id] * lm.n_q),
            zero=lm.zero_token_id,
            text_padding=lm.text_padding_token_id,
            end_of_text_padding=lm.end_of_text_padding_id,
        )

    @property
    def codebooks(self) -> int:
        """K: the text stream and all audio codebooks."""
        return 1 + self.n_q

    @property
    def channels(self) -> int:
        """Audio channels that the model hears: 2, or 1 for models of one voice."""
        return self.n_q // self.dep_q

    def delayed(self, codes: Tensor) -> Tensor:
        """Delay the codes of one session, once, as `LMModel.forward` does.

        Args:
            codes: `[K, T]`.

        Returns:
            `[K, T + 1]`: the model's input at frame t is column t, its target column t + 1. Codes
            that the delay moves past the end are gone.
        """
        length = codes.shape[1]
        first = torch.tensor(self.initial, dtype=codes.dtype, device=codes.device)
        out = first[:, None].repeat(1, length + 1)
        for stream, delay in enumerate(self.delays):
            kept = max(0, length - delay)
            out[stream, 1 + delay : 1 + delay + kept] = codes[stream, :kept]
        return out

    def predicted(self, codes: Tensor) -> Tensor:
        """Where the targets of delayed codes are codes, neither padding nor initial tokens.

        Args:
            codes: delayed, `[B, K, T + 1]`, as in `Batch.codes`.

        Returns:
            bool `[B, K, T]`, aligned with the targets `codes[:, :, 1:]`. For the text and the
            `dep_q` streams after it these are the masks of `LMModel.forward`, delayed.
        """
        targets = codes[:, :, 1:]
        first = torch.tensor(self.initial, dtype=codes.dtype, device=codes.device)
        return (targets != self.zero) & (targets != first[:, None])

    def counts(self, codes: Tensor) -> Tensor:
        """The frames of delayed codes with something to predict, bool `[B, T]`; not padding."""
        return self.predicted(codes).any(1)
