"""Virtual keys and values that lie ready, where a read-out is read many times before it changes.

A read-out changes once in C steps. For few rows, a CPU would spend most of a step's time on reading
the weights that make virtual tokens of it (`memory/tokens.py`) from main memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .memory import VirtualTokens
from .memory.tokens import LatentTokens
from .precision import full_precision, wide, widened
from .rows import captured, per_row

if TYPE_CHECKING:
    from .cache import HierarchicalCache
    from .state import CacheState

ROWS = 32  # computing a product with so many rows takes as long as reading its matrix


class Weights(NamedTuple):
    """Weights as they were.

    Attributes:
        kept: detached, they share memory and version counter with the weights.
        versions: how often each had been written to.
    """

    kept: list[Tensor]
    versions: list[int]

    @classmethod
    def of(cls, weights: list[Tensor]) -> Weights:
        return cls([w.detach() for w in weights], [w._version for w in weights])

    def still(self, weights: list[Tensor]) -> bool:
        """Whether these are the same, not written to since.

        Only what goes past the version counter, through `.data`, shows no earlier than in the next
        version, as everything does that the read-outs themselves are made of.
        """
        return [w._version for w in weights] == self.versions and all(
            w.is_set_to(kept) for w, kept in zip(weights, self.kept, strict=True)
        )


class Ready:
    """The virtual tokens of one state's read-outs: derived from the state, and no part of it.

    States and weights may be changed from outside in many ways, and nobody has to say so: tokens
    are compared with what they were made of, and made again, row by row, where that is new.
    """

    def __init__(self) -> None:
        self.weights = Weights([], [])
        self.made: dict[str, Tensor] = {}

    def tokens(
        self, reader: LatentTokens, readout: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of read-outs `[B, M, E]`: `[B, Hkv, M, D]` each, in `dtype`."""
        made = self.made
        if not (made and self.weights.still(reader.of_tokens) and _fit(made, readout, dtype)):
            made = self.made = _unmade(reader, readout, dtype)
            self.weights = Weights.of(reader.of_tokens)
        if not torch.equal(made["readout"], readout):
            changed = (made["readout"] != readout).flatten(1).any(1)  # NaN always is
            # An interruption must leave nothing that seems to fit.
            made["readout"].masked_fill_(per_row(changed, readout), torch.nan)
            with full_precision(readout):
                for row in changed.nonzero().flatten().tolist():
                    # By itself: how a product of several rows rounds depends on how many they are,
                    # and a conversation that was restored must go on to the bit.
                    one = slice(row, row + 1)
                    reader.make({name: t[one] for name, t in made.items()}, readout[one])
        return made["keys"], made["values"]


def _fit(made: dict[str, Tensor], readout: Tensor, dtype: torch.dtype) -> bool:
    """Whether tokens of the read-outs have a place."""
    old = made["readout"]
    return (old.shape, old.dtype, made["keys"].dtype) == (readout.shape, readout.dtype, dtype)


def _unmade(reader: LatentTokens, readout: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Room for tokens, none of them made."""
    kv_heads, head_dim, slots = reader.slot_key.shape
    tokens = (len(readout), kv_heads, slots, head_dim)
    with torch.inference_mode(False):  # or a step that is not within that mode could not write
        return {
            "keys": torch.zeros(tokens, dtype=dtype, device=readout.device),
            "values": torch.zeros(tokens, dtype=dtype, device=readout.device),
            "readout": torch.full_like(readout, torch.nan),
        }


def read(
    cache: HierarchicalCache, reader: VirtualTokens, q: Tensor, state: CacheState
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Virtual tokens of a state, for one query of each head, `[B, Hkv, R, 1, D]`.

    Returns:
        scores `[B, Hkv, R, 1, M]`, and what makes of such weights `[B, Hkv, R, 1, D]`.
    """
    if isinstance(reader, LatentTokens) and _pays(cache, reader, state.readout):
        keys, values = state.ready.tokens(reader, state.readout, wide(q.dtype))
        scores = reader.score_made(widened(q.squeeze(3)), keys).unsqueeze(3)
        return (
            scores,
            lambda weights: (widened(weights.squeeze(3)) @ values).unsqueeze(3).to(q.dtype),
        )
    readout = state.readout[:, None, None]  # one group of one query, one version
    scores = reader.score(q.unsqueeze(3), readout).squeeze(3)
    return scores, lambda weights: reader.mix(weights.unsqueeze(3), readout).squeeze(3)


def _pays(cache: HierarchicalCache, reader: LatentTokens, readout: Tensor) -> bool:
    """Whether making tokens of every version costs less than absorbing weights in every step.

    Rows in different phases publish in different steps, and each reads the weights for itself.
    """
    # Inference tensors do not count what is written to them.
    if captured(readout.device) or any(w.is_inference() for w in reader.of_tokens):
        return False
    batch, queries = len(readout), len(readout) * cache.num_heads // cache.kv_heads
    return batch * (ROWS + reader.slots) < cache.window.chunk * (ROWS + queries)
