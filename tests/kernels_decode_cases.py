"""The decode kernel against its reference; `test_kernels_decode.py` runs this interpreted.

A step starts from rows in every phase: empty, filling, before, at and behind the end of a chunk.
What a query may not see is NaN, and so is every output before the kernel writes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kernels_support import assert_accurate

from ttt_cache.kernels import reference
from ttt_cache.kernels.decode import decode, decode_launch
from ttt_cache.kernels.inputs import GATES, Gate, Layer, Ring, Token, Virtual
from ttt_cache.kernels.rotary import frequencies
from ttt_cache.kernels.workspace import Workspace

SMALL = Layer(recent=7, chunk=4)


@dataclass(frozen=True)
class Case:
    """Sizes and settings of one step."""

    layer: Layer = SMALL
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 32
    sinks: int = 0
    slots: int = 3
    latent_dim: int = 8
    gate: str = "joint"
    turns: bool = True
    dtype: torch.dtype = torch.float32
    batch: int = 3

    def counts(self) -> torch.Tensor:
        """Tokens before the step: rows in every phase, one of them an hour old."""
        layer = self.layer
        full, hour = layer.capacity + layer.chunk * 3, 45_000
        phases = [full, 0, layer.recent - 1, layer.written - 1, hour, layer.written - 2]
        return torch.tensor(phases[-self.batch :]).clamp(min=0)

    def token(self) -> Token:
        """q, k and v as views of one projection, as Moshi's are."""
        together = self.heads + 2 * self.kv_heads
        made = torch.randn(self.batch, together, self.head_dim).to(self.dtype)
        q, k, v = made.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        mask = torch.arange(self.batch) >= self.batch // 3  # of two rows none is left out
        turns = frequencies(self.head_dim, 10_000.0, "cpu") if self.turns else None
        return Token(q, k, v, mask, turns)

    def ring(self) -> Ring:
        kept = (self.batch, self.kv_heads, self.layer.capacity, self.head_dim)
        sinks = (self.batch, self.kv_heads, self.sinks, self.head_dim)
        keys, values = torch.randn(2, *kept).to(self.dtype)
        sink_keys, sink_values = torch.randn(2, *sinks).to(self.dtype)
        return Ring(self.counts(), keys, values, sink_keys, sink_values)

    def virtual(self) -> Virtual | None:
        if not self.slots:
            return None
        absorbed = torch.randn(self.batch, self.heads, self.latent_dim + self.slots)
        latents = torch.randn(self.batch, self.slots, self.latent_dim)
        bias = torch.randn(1 if self.gate == "layer" else self.heads).to(self.dtype)
        weight = torch.randn(self.heads, self.head_dim).to(self.dtype) / 6
        gate = Gate(
            self.gate,
            alpha=0.7,
            bias=None if self.gate == "fixed" else bias,
            weight=weight if self.gate == "query" else None,
        )
        return Virtual(absorbed.to(self.dtype), latents, gate)


CASES = {
    **{gate: Case(gate=gate) for gate in GATES},
    "every phase": Case(batch=6, sinks=2, heads=1, kv_heads=1),
    "window": Case(slots=0),
    "more sinks than a chunk": Case(sinks=9, slots=0, heads=1, kv_heads=1),
    "arrived": Case(layer=Layer(7, 4, arrived=True), heads=1, kv_heads=1),
    "one slot": Case(layer=Layer(1, 1), slots=1, latent_dim=1),
    "halves": Case(layer=Layer(7, 4, interleave=False), sinks=2, heads=1, kv_heads=1),
    "no positions": Case(turns=False, sinks=2, heads=1, kv_heads=1),
    "repeated": Case(heads=4, sinks=1, gate="query", batch=2),
    "63 split": Case(layer=Layer(63, 8), head_dim=64, heads=1, kv_heads=1),
    "100 split": Case(layer=Layer(100, 8), head_dim=128, batch=2, heads=1, kv_heads=1),
    "100 whole": Case(layer=Layer(100, 8), batch=2, heads=1, kv_heads=1),
    "split with sinks": Case(layer=Layer(40, 8), head_dim=128, batch=2, sinks=4, gate="residual"),
    "split window": Case(layer=Layer(70, 1), head_dim=96, batch=2, slots=0, heads=1, kv_heads=1),
    "split and repeated": Case(layer=Layer(33, 1), kv_heads=1, head_dim=128, batch=2),
    "many slots": Case(head_dim=48, slots=21, latent_dim=300, batch=2),
    "bfloat16": Case(dtype=torch.bfloat16, sinks=2),
    "float16": Case(dtype=torch.float16, gate="query"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_step(name):
    case = CASES[name]
    torch.manual_seed(len(name))
    token, ring, virtual = case.token(), case.ring(), case.virtual()
    exact, plain = (in_dtype(dtype, token, ring, virtual) for dtype in (torch.float64, case.dtype))
    expected, close = (reference.decode(t, r, case.layer, v) for t, r, v in (exact, plain))
    poison_hidden(ring, case.layer)
    before = Ring(*(x.clone() for x in ring))
    space = Workspace.of(ring, case.heads, case.latent_dim if virtual else 0)
    assert (space.split.parts > 1) == ("split" in name)
    out = tuple(x if x is None else torch.full_like(x, math.nan) for x in close)
    decode_launch(token, ring, case.layer, virtual, space, out).run()
    for found, wide, narrow in zip(out, expected, close, strict=True):
        if found is not None and wide is not None and narrow is not None:
            assert torch.isfinite(found).all()  # in masked rows too
            assert_accurate(found[token.mask], wide[token.mask], narrow[token.mask])
    assert_kept(before, ring, exact[1], plain[1])
    assert torch.equal(ring.executed, before.executed + token.mask)
    assert not space.rows.any() and not space.heads.any()


def test_session():
    """Steps on the kernel's own state: what it writes, and hands on, is what it reads later."""
    case = Case(layer=Layer(3, 2), sinks=2, batch=2, gate="head", heads=1, kv_heads=1)
    torch.manual_seed(0)
    ring, virtual = case.ring(), case.virtual()
    for kept in ring:
        kept.zero_()
    exact = in_dtype(torch.float64, case.token(), ring, virtual)[1]
    space = Workspace.of(ring, case.heads, case.latent_dim)
    for step in range(8):
        token, virtual = case.token(), case.virtual()
        token = token._replace(mask=torch.tensor([True, step % 3 > 0]))
        wide = in_dtype(torch.float64, token, ring, virtual)
        found = decode(token, ring, case.layer, virtual, space)
        expected = reference.decode(wide[0], exact, case.layer, wide[2])
        for one, other in zip(found, expected, strict=True):
            gap = one[token.mask].double() - other[token.mask]
            assert gap.abs().max() < 2e-6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_apart(value):
    """What is no number in one row changes no bit of another."""
    case = Case(sinks=2, slots=0, batch=2, kv_heads=1)
    torch.manual_seed(0)
    token, ring = case.token(), case.ring()
    token.mask.fill_(True)
    found = []
    for spoilt in (False, True):
        mine, kept, _ = in_dtype(case.dtype, token, ring, None)
        if spoilt:
            mine.q[0], mine.k[0], kept.values[0] = value, value, value
        recent, _ = decode(mine, kept, case.layer, None, Workspace.of(kept, case.heads, 0))
        found.append((recent[1], kept.keys[1], kept.sink_keys[1]))
    for clean, beside in zip(*found, strict=True):
        assert torch.equal(clean, beside)


def in_dtype(
    dtype: torch.dtype, token: Token, ring: Ring, virtual: Virtual | None
) -> tuple[Token, Ring, Virtual | None]:
    """Copies of everything, floating-point numbers in `dtype`; angles stay those of float32."""

    def cast(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return x.to(dtype, copy=True) if x.is_floating_point() else x.clone()

    cast_token = Token(*map(cast, token))._replace(frequencies=token.frequencies)
    if virtual is not None:
        gate = Gate(*map(cast, virtual.gate))
        virtual = Virtual(cast(virtual.absorbed), virtual.readout, gate)
    return cast_token, Ring(*map(cast, ring)), virtual


def poison_hidden(ring: Ring, layer: Layer) -> None:
    """NaN into the slots that the next token may not see, its own included."""
    number = ring.executed[:, None] + 1
    gone = (number - layer.recent).clamp(min=0) // layer.leaving * layer.leaving
    age = (number - 1 - torch.arange(layer.capacity)) % layer.capacity
    hidden = (age >= number - gone) | (age == 0)
    sinks = torch.arange(ring.sink_keys.shape[2]) >= gone
    for tensor, where in zip(ring[1:], (hidden, hidden, sinks, sinks), strict=True):
        tensor.masked_fill_(where[:, None, :, None], math.nan)


def assert_kept(before: Ring, after: Ring, exact: Ring, plain: Ring) -> None:
    """The token stands where it belongs, and no other bit has changed."""
    number, executed = after.executed, after.executed > before.executed
    of_ring, of_sinks = executed, executed & (number <= before.sink_keys.shape[2])
    writes = (of_ring, of_ring, of_sinks, of_sinks)
    for old, new, wide, narrow, rows in zip(
        before[1:], after[1:], exact[1:], plain[1:], writes, strict=True
    ):
        fresh = old.isnan() & ~new.isnan()
        assert torch.equal(fresh.any(-1).any(1).sum(1), rows.long())
        assert torch.equal(old[~fresh].view(torch.uint8), new[~fresh].view(torch.uint8))
        if rows.any():
            assert_accurate(new[fresh], wide[fresh], narrow[fresh])
