"""What the tests of the cache share: a cache of given settings, its inputs, and `Session`."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from moshi.modules.rope import RotaryEmbedding
from oracle import Oracle
from torch import Tensor

from ttt_cache import CacheConfig, CacheState, HierarchicalCache, span
from ttt_cache.cache import Rotation

span.BLOCK = 1  # small blocks of queries, so that a few dozen tokens make several
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}  # of the outputs' scale
Saved = tuple[CacheState, list[Oracle], float]


@dataclass(frozen=True)
class Case:
    """One cache: its settings, its sizes and the seed of its weights and inputs."""

    config: CacheConfig
    num_heads: int = 2
    kv_heads: int = 2
    head_dim: int = 4
    dim: int = 5
    dtype: torch.dtype = torch.float64
    turns: bool = True  # has RoPE
    repeats: bool = False  # every token is one of three
    seed: int = 0

    def build(self) -> HierarchicalCache:
        """The cache with its own initial weights."""
        torch.manual_seed(self.seed)
        return HierarchicalCache(
            self.config,
            dim=self.dim,
            num_heads=self.num_heads,
            head_dim=self.head_dim,
            kv_heads=self.kv_heads,
            rope=self.rope if self.turns else None,
            dtype=self.dtype,
        )

    def build_stirred(self) -> HierarchicalCache:
        """The cache with random weights: many start at zero and would hide what they multiply."""
        cache = self.build()
        width = self.config.memory_heads * self.config.memory_dim
        wide = ("reader.to_key", "reader.to_value", "reader.to_output")
        with torch.no_grad():
            for name, parameter in cache.named_parameters():
                fan_in = parameter.shape[0] if name.endswith(".project") else 1
                parameter.normal_(std=1 / math.sqrt(width if name in wide else fan_in))
        return cache

    @property
    def rope(self) -> Rotation:
        # Moshi's own works in float32 whatever it is given.
        return rope64 if self.dtype == torch.float64 else RotaryEmbedding(interleave=True)

    @property
    def capacity(self) -> int:
        """Tokens that a window can hold; nothing is evicted before there are more."""
        return self.config.window.capacity

    @property
    def unwritten(self) -> int:
        """Tokens that do not read the memory yet, where there is one."""
        window = self.config.window
        if not window.arrived:
            return window.capacity
        return 0 if self.config.read == "query" else self.config.chunk - 1

    @property
    def identical(self) -> int:
        """Tokens after which the layer may differ from the unpatched one."""
        unread = self.config.memory == "none" or self.config.reset_memory
        return self.capacity if unread else min(self.capacity, self.unwritten)

    def tokens(self, batch: int, length: int) -> Tokens:
        """Random tokens; a call after `build` or another `tokens` gives new ones."""

        again = torch.randint(3, (batch, length)) if self.repeats else None
        pool = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            if again is None:
                return torch.randn(shape, dtype=torch.float64).to(self.dtype)
            few = torch.randn(batch, *shape[1:-2], 3, shape[-1], generator=pool)
            index = again.view(batch, *[1] * (len(shape) - 3), length, 1).expand(shape)
            return few.double().gather(-2, index).to(self.dtype)

        return Tokens(
            draw(batch, self.num_heads, length, self.head_dim),
            draw(batch, self.kv_heads, length, self.head_dim),
            draw(batch, self.kv_heads, length, self.head_dim),
            draw(batch, length, self.dim),
        )


class Tokens(NamedTuple):
    """Arguments of a cache for T tokens of B rows."""

    q: Tensor  # [B, H, T, D]
    k: Tensor  # [B, Hkv, T, D]
    v: Tensor
    x: Tensor  # [B, T, dim]

    @property
    def length(self) -> int:
        return self.x.shape[1]

    def cut(self, start: int, stop: int) -> Tokens:
        heads = (z[:, :, start:stop] for z in self[:3])
        return Tokens(*heads, self.x[:, start:stop])

    def split(self, lengths: list[int]) -> list[Tokens]:
        ends = torch.tensor(lengths).cumsum(0).tolist()
        return [self.cut(end - n, end) for n, end in zip(lengths, ends, strict=True)]

    def clone(self) -> Tokens:
        return Tokens(*(z.clone() for z in self))

    def at(self, row: int, t: int) -> tuple[Tensor, ...]:
        """One token of one row, as the oracle takes it."""
        return (*(z[row, :, t] for z in self[:3]), self.x[row, t])


def rope64(q: Tensor, k: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """RoPE in float64, for comparisons that Moshi's float32 angles would blur."""
    half, length = q.shape[-1] // 2, q.shape[2]
    rate = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    position = offset.double().view(-1, 1, 1, 1) + torch.arange(length).view(1, 1, -1, 1)
    turn = torch.polar(torch.ones(()).double(), position * rate)

    def turned(z: Tensor) -> Tensor:
        pairs = torch.view_as_complex(z.double().unflatten(-1, (half, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2).to(z.dtype)

    return turned(q), turned(k)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, scale: float = 0.0) -> None:
    """Equal to within `tolerance` of the largest of `expected` or of a known larger `scale`."""
    scale = max(scale, expected.abs().max().item())
    worst = (actual - expected).abs().max().item() / scale
    assert worst <= tolerance, f"differs by {worst:.2e} of the scale, allowed {tolerance:.0e}"


def bits(tensor: Tensor) -> Tensor:
    """The raw bytes: tells -0 from 0 and one NaN from another."""
    return tensor.flatten().clone().view(torch.uint8)


class Session:
    """A batch of conversations beside one oracle per row; every call compares the two.

    The tolerance is a share of the largest output that the session has had: a single step of
    attention may happen to cancel.
    """

    def __init__(self, case: Case, cache: HierarchicalCache, batch: int) -> None:
        self.case, self.cache, self.batch = case, cache, batch
        self.state = cache.init_state(batch)
        self.oracles = [Oracle(cache) for _ in range(batch)]
        self.scale = 0.0

    def stream(self, tokens: Tokens, mask: list[bool] | None = None) -> Tensor:
        """One streaming call; masked rows must keep every bit and have a finite output."""
        executed = mask or [True] * self.batch
        given = None if mask is None else torch.tensor(mask)
        before = self.state.clone()
        y = self.cache.stream(*tokens, self.state, given)
        idle = ~torch.tensor(executed)
        for (name, old), (_, new) in zip(before.tensors(), self.state.tensors(), strict=True):
            assert torch.equal(bits(old[idle]), bits(new[idle])), f"masked rows changed {name}"
        assert y.isfinite().all()
        self.compare(y, tokens, executed)
        return y

    def forward(self, tokens: Tokens) -> Tensor:
        """One functional call; the state that is passed in must not change."""
        before = self.state.clone()
        y, new = self.cache(*tokens, self.state)
        for (name, old), (_, same) in zip(before.tensors(), self.state.tensors(), strict=True):
            assert torch.equal(bits(old), bits(same)), f"the parallel form changed {name}"
        self.state = new.detach()
        self.compare(y.detach(), tokens, [True] * self.batch)
        return y.detach()

    def compare(self, y: Tensor, tokens: Tokens, executed: list[bool]) -> None:
        for row in range(self.batch):
            if executed[row]:
                pushed = [self.oracles[row].push(*tokens.at(row, t)) for t in range(tokens.length)]
                expected = torch.stack(pushed, dim=1)
                self.scale = max(self.scale, expected.abs().max().item())
                assert_near(y[row], expected, TOLERANCE[self.case.dtype], self.scale)

    def reset(self, mask: list[bool]) -> None:
        """Reset the rows of `mask`: all zeros after it, the others with every bit as before."""
        before, gone = self.state.clone(), torch.tensor(mask)
        self.state.reset(gone)
        for (name, old), (_, new) in zip(before.tensors(), self.state.tensors(), strict=True):
            assert not bits(new[gone]).any(), f"a reset left something in {name}"
            assert torch.equal(bits(old[~gone]), bits(new[~gone])), f"a reset spread to {name}"
        for row in range(self.batch):
            if mask[row]:
                self.oracles[row].reset()

    def save(self) -> Saved:
        return self.state.clone(), deepcopy(self.oracles), self.scale

    def restore(self, saved: Saved) -> None:
        """Put a saved state back in place, as a loaded session is."""
        state, oracles, self.scale = saved
        for (_, mine), (_, theirs) in zip(self.state.tensors(), state.tensors(), strict=True):
            mine.copy_(theirs)
        self.oracles = deepcopy(oracles)
