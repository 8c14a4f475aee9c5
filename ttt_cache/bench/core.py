"""The attention core of one layer: everything between its in- and its out-projection.

Moshi's own and the patched attention run as they are, streaming, with stand-ins for both
projections: the one hands out frames that were projected beforehand, the other does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from moshi.modules.transformer import StreamingMultiheadAttention, StreamingTransformer
from torch import Tensor, nn

import ttt_cache
from ttt_cache.backend import VARIABLE
from ttt_cache.cache import HierarchicalCache
from ttt_cache.memory.tokens import LatentTokens
from ttt_cache.patched import PatchedAttention, PatchedState
from ttt_cache.state import CacheState
from ttt_cache.targets import attention_of


class Widths(NamedTuple):
    """Of a layer: its model width, and heads that share it."""

    dim: int
    heads: int


MOSHI = Widths(4096, 32)  # of Moshi 7B


@dataclass(frozen=True)
class Place:
    """Where cores are built, and how many conversations they hold at once."""

    batch: int
    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    widths: Widths = MOSHI

    def frames(self, steps: int) -> tuple[Tensor, Tensor]:
        """Hidden states `[K, B, 1, dim]` and projected frames `[K, B, 1, 3 dim]`."""
        shape, where = (steps, self.batch, 1), {"device": self.device, "dtype": self.dtype}
        dim = self.widths.dim
        return torch.randn(*shape, dim, **where), torch.randn(*shape, 3 * dim, **where)


class Given(nn.Module):
    """Stands in for the in-projection: hands out the frame that it was given."""

    frame: Tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.frame


class Core:
    """One attention without its projections, streaming; cores of one place share their weights.

    Args:
        context: frames in the ring of a stock core.
        settings: of `ttt_cache.patch`; `None` leaves Moshi's own attention.
        backend: which code answers the steps of a patched core, as in `TTT_CACHE_BACKEND`.
    """

    def __init__(
        self,
        place: Place,
        context: int,
        settings: Mapping[str, Any] | None = None,
        backend: str = "reference",
    ) -> None:
        self.place = place
        # On no device: of the whole layer nothing is needed but the attention's format.
        model = StreamingTransformer(
            d_model=place.widths.dim,
            num_heads=place.widths.heads,
            num_layers=1,
            dim_feedforward=1,
            causal=True,
            context=context,
            positional_embedding="rope",
            device="meta",
        ).eval()
        self.attention: StreamingMultiheadAttention = attention_of(model, 0)
        # Ring and cache take device and dtype from the projection.
        self.attention.in_projs[0] = nn.Linear(1, 1, device=place.device, dtype=place.dtype)
        torch.manual_seed(place.seed)
        if settings is not None:
            ttt_cache.patch(model, **settings)
            stir(model)
        with chosen(backend):
            self.attention.streaming_forever(place.batch)
        self.given = Given()
        self.attention.in_projs[0], self.attention.out_projs[0] = self.given, nn.Identity()

    @property
    def cache(self) -> HierarchicalCache:
        """That of a patched core."""
        assert isinstance(self.attention, PatchedAttention)
        return self.attention.ttt_cache

    @property
    def streaming(self) -> Any:
        """The attention's streaming state, Moshi's own or patched."""
        return self.attention._streaming_state

    @property
    def state(self) -> CacheState | None:
        """That of the cache; `None` for a stock core."""
        return self.streaming.cache if isinstance(self.streaming, PatchedState) else None

    @torch.no_grad()
    def step(self, hidden: Tensor, projected: Tensor) -> Tensor:
        """One frame of every row, `[B, 1, dim]` and `[B, 1, 3 dim]`; returns `[B, 1, dim]`."""
        self.given.frame = projected
        return self.attention(hidden, hidden, hidden)

    def fill(self) -> None:
        """Fill a stock core's ring."""
        fill_ring(self.streaming)

    @property
    def state_bytes(self) -> int:
        """What the layer remembers of one conversation."""
        if self.state is not None:
            return self.state.nbytes // self.place.batch
        return self.streaming.kv_cache.cache.nbytes // self.place.batch


def fill_ring(state: Any) -> None:
    """Fill the ring of stock Moshi's attention at random, and count its tokens.

    Stepping through them would take minutes.
    """
    ring = state.kv_cache
    ring.cache.normal_()
    ring.end_offset += ring.capacity
    state.offset += ring.capacity


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """A new memory adds nothing: its values start at zero, and would show no error."""
    for module in model.modules():
        if isinstance(module, LatentTokens):
            module.to_value.normal_(std=module.to_value.shape[1] ** -0.5)


@contextmanager
def chosen(backend: str) -> Iterator[None]:
    """A context in which `TTT_CACHE_BACKEND` is that."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
