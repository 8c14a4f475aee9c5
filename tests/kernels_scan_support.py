"""What the tests of the memory scan share: sizes, arguments, and what an arm makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from kernels_support import assert_accurate
from torch import Tensor
from torch.nn.functional import normalize

from ttt_cache.kernels import memory_scan_reference as reference
from ttt_cache.kernels.memory_scan_inputs import Scan
from ttt_cache.memory import chunks
from ttt_cache.memory.delta import Chunk, Rule

Arm = Callable[..., tuple[Tensor | None, ...]]
OUTPUTS = ("firsts", "lasts", "end first", "end last", "end total")


@dataclass(frozen=True)
class Case:
    """Sizes of a scan, and what is special about its tokens."""

    chunks: int = 3
    nets: int = 2
    tokens: int = 3
    d: int = 16
    n: int = 32  # 0 for a linear memory
    loud: bool = False  # F is beyond its cap where a chunk ends
    alike: bool = False  # keys of a chunk are nearly the same, and rates nearly 1
    closed: tuple[int, ...] = ()  # chunks that each network ends; all, for those not named

    def draw(self) -> Scan:
        every, d, n = (self.chunks, self.nets, self.tokens), self.d, self.n or self.d
        k = torch.randn(*every, d)
        eta = torch.rand(*every, 1)
        if self.alike:
            k, eta = k[:, :, :1] + 0.01 * k, 1 - 0.01 * eta
        k, v, closes = normalize(k, dim=-1), torch.randn(*every, d), torch.ones(*every[:2], 1, 1)
        for net, closed in enumerate(self.closed):
            closes[closed:, net] = 0
            for part in (k, v):  # a chunk that is not ended is half full, those behind are empty
                part[closed : closed + 1, net, self.tokens // 2 :] = 0
                part[closed + 1 :, net] = 0
        last = torch.randn(self.nets, n, d) * (2 if self.loud else 0.1)
        hidden: tuple[Tensor | None, ...] = (None,) * 4
        if self.n:
            weights = torch.randn(2, self.nets, d, n)
            norm = torch.linalg.vector_norm(torch.randn(self.nets, d, n), dim=-2, keepdim=True)
            hidden = (*weights, torch.rand(self.nets, 1, 1), norm)
        first, total, rate, norm = hidden
        cap, chunk = math.sqrt(n * d), self.tokens
        return Scan(k, v, eta, first, last, total, rate, norm, closes.bool(), chunk, cap)


def given(*scan: Any) -> chunks.Given:
    """The arguments of a scan as `chunks.run` takes them."""
    k, v, eta, first, last, total, rate, norm, closes, chunk, cap = scan
    first, total, rate, norm = ([] if z is None else [z] for z in (first, total, rate, norm))
    return chunks.Given(Chunk(k, v, eta), first, last, total, Rule(chunk, cap, rate, norm), closes)


def plain(*scan: Any) -> tuple[Tensor | None, ...]:
    """The scan in plain PyTorch."""
    hidden, last, (end_hidden, end_last, totals) = chunks.run(given(*scan))
    first, end_first, total = (each[0] if each else None for each in (hidden, end_hidden, totals))
    return first, last, end_first, end_last, total


def made(arm: Arm, scan: Scan, by: list[Tensor | None], dtype: torch.dtype) -> dict[str, Tensor]:
    """What an arm makes, and its gradients by every tensor, for gradients `by` its outputs."""
    leaves = {}
    for name, one in scan._asdict().items():
        if isinstance(one, Tensor) and one.is_floating_point():
            leaves[name] = one.to(dtype).requires_grad_()
    outputs = arm(*scan._replace(**leaves))
    found = {n: z for n, z in zip(OUTPUTS, outputs, strict=True) if z is not None}
    pairs = [(z, b) for z, b in zip(outputs, by, strict=True) if z is not None and b is not None]
    loss = torch.stack([(z * b.to(dtype)).sum() for z, b in pairs]).sum()
    by_leaves = torch.autograd.grad(loss, list(leaves.values()))
    return found | {f"by {n}": z for n, z in zip(leaves, by_leaves, strict=True)}


def gradients(scan: Scan) -> list[Tensor | None]:
    """Gradients by the outputs of a scan."""
    return [None if z is None else torch.randn_like(z) for z in plain(*scan)]


def compare(arm: Arm, scan: Scan) -> dict[str, float]:
    """Errors of a kernel as shares of the budget, by name."""
    by = gradients(scan)
    exact = made(reference.memory_scan, scan, by, torch.float64)
    usual = made(plain, scan, by, torch.float32)
    found = made(arm, scan, by, torch.float32)
    assert found.keys() == exact.keys()
    shares = {}
    for name in exact:
        # One number for each network may be closer than its arithmetic is, by luck.
        share = 8.0 if name == "by rate" else 2.0
        shares[name] = assert_accurate(found[name], exact[name], usual[name], share)
    return shares
