"""Where attention goes: how much of it to the memory, and to how many of its virtual tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from moshi.models.lm import LMModel
from torch import Tensor, nn

from ttt_cache.cache import HierarchicalCache
from ttt_cache.memory import VirtualTokens
from ttt_cache.patch import Patch, require_patch

from .forced import forced
from .pieces import peeked
from .source import Piece


def attention_mass(lm: LMModel, pieces: Iterable[Piece]) -> dict[str, Any]:
    """Run conversations through a patched model and look where its heads attend.

    Args:
        lm: as for `forced`.
        pieces: consecutive pieces of conversations, at least one.

    Returns:
        as `Watched.result`.

    Raises:
        RuntimeError, ValueError: as `forced`; there are no pieces.
    """
    rows, pieces = peeked(pieces)
    with watched(require_patch(lm)) as seen:
        for _ in forced(lm, pieces, rows):
            pass
    return seen.result()


class Watched:
    """Sums over the queries of every layer that has a memory."""

    def __init__(self, handle: Patch) -> None:
        remembering = (n for n in sorted(handle.layers) if handle.caches[n].memory is not None)
        self.layers = {layer: _Sums(handle.caches[layer]) for layer in remembering}

    def result(self) -> dict[str, Any]:
        """What was seen so far, JSON-able: by layer that has a memory, as a string,

        - `queries`: those of each head that read a written memory; all figures are their means;
        - `mass`: of each head, the share of its output's weight that the memory has: attention to
          virtual tokens, or what the gate gives to the answer to its own query;
        - `virtual`: how many virtual tokens there are; where there are none, nothing follows:
        - `entropy`: of each head, of its attention among the virtual tokens, in nats, at most
          `log(virtual)`;
        - `slots`: of each head, its attention to each of the virtual tokens, as shares of `mass`.

        Means of a layer that no query has read are `None`.
        """
        return {str(layer): sums.result() for layer, sums in self.layers.items()}


@contextmanager
def watched(handle: Patch) -> Iterator[Watched]:
    """Within it whatever the patched model is given in parallel form, as `forced` does, is seen.

    Nothing that the model computes changes.
    """
    seen, kept = Watched(handle), {}
    with ExitStack() as stack:
        for sums in seen.layers.values():
            reader = sums.cache.reader
            if isinstance(reader, VirtualTokens):
                if reader not in kept:  # layers may share one
                    kept[reader] = stack.enter_context(_weights_kept(reader))
                sums.weights = kept[reader]
            hook = sums.cache.register_forward_hook(sums.add)
            stack.callback(hook.remove)
        yield seen


@contextmanager
def _weights_kept(reader: VirtualTokens) -> Iterator[list[Tensor]]:
    """Yields what the reader is given to mix its tokens with, block by block of queries."""
    kept: list[Tensor] = []

    def mix(weights: Tensor, readout: Tensor) -> Tensor:
        kept.append(weights)
        return type(reader).mix(reader, weights, readout)

    vars(reader)["mix"] = mix
    try:
        yield kept
    finally:
        del vars(reader)["mix"]


class _Sums:
    """Of one layer; tensors, so that looking does not wait for a GPU."""

    def __init__(self, cache: HierarchicalCache) -> None:
        self.cache = cache
        self.weights: list[Tensor] | None = None  # of the call that is running, if by virtual token
        self.queries: Tensor | int = 0
        self.mass: Tensor | int = 0  # [H]
        self.entropy: Tensor | int = 0
        self.slots: Tensor | int = 0  # [H, M]

    def add(self, _: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        """A forward hook of the cache."""
        q, state = inputs[0], inputs[4] if len(inputs) > 4 else None
        start = torch.zeros(1, dtype=torch.long, device=q.device) if state is None else state.count
        tokens = start[:, None] + torch.arange(1, q.shape[2] + 1, device=q.device)
        written = self.cache.written(tokens).expand(q.shape[0], -1)
        self.queries = self.queries + written.sum()
        if self.weights is None:
            mass = self._given(q, written)
        else:
            weights = self._taken(q.shape[2]) * written[:, None, :, None]
            mass = weights.sum(-1)
            shares = weights / mass[..., None].clamp_min(torch.finfo(mass.dtype).tiny)
            self.entropy = self.entropy + torch.special.entr(shares).sum((0, 2, 3))
            self.slots = self.slots + weights.sum((0, 2))
        self.mass = self.mass + mass.sum((0, 2))

    def result(self) -> dict[str, Any]:
        queries = int(self.queries)
        found: dict[str, Any] = {"queries": queries, "mass": _means(self.mass, queries)}
        if self.weights is not None:
            found["virtual"] = self.cache.reader.slots  # type: ignore[union-attr]
            found["entropy"] = _means(self.entropy, queries)
            shares = self.slots / self.mass[:, None] if queries else None  # type: ignore[index]
            found["slots"] = None if shares is None else shares.tolist()
        return found

    def _taken(self, length: int) -> Tensor:
        """The call's weights on virtual tokens, without their sign, float64 `[B, H, T, M]`."""
        assert self.weights is not None and isinstance(self.cache.reader, VirtualTokens)
        # Blocks of queries in groups of a chunk, the last one padded; a group may meet two versions
        # of the tokens, each query one of them.
        blocks = torch.cat([block.flatten(3, 4) for block in self.weights], dim=3)
        self.weights.clear()
        versions = blocks[:, :, :, :length].flatten(1, 2).double().abs()
        return versions.unflatten(-1, (-1, self.cache.reader.slots)).sum(-2)

    def _given(self, q: Tensor, written: Tensor) -> Tensor:
        """What the gate gives to the answers to queries of their own, float64 `[B, H, T]`."""
        if self.cache.gate is None:  # there is no window
            return written[:, None].expand(q.shape[:3]).double()
        grouped = self.cache.by_key_head(q)
        _, share = self.cache.gate.shares(written[:, None, None, :, None], grouped)
        return share.expand_as(grouped)[..., 0].flatten(1, 2).double().abs()


def _means(sums: Tensor | int, queries: int) -> list[float] | None:
    return (sums / queries).tolist() if isinstance(sums, Tensor) and queries else None
