"""The training attention against its reference; `test_kernels_window.py` runs this interpreted.

Rows are in different phases. What no query sees is NaN, and so is every output before a kernel
writes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from kernels_support import assert_accurate
from torch import Tensor

from ttt_cache.kernels import window_reference as reference
from ttt_cache.kernels.inputs import GATES, Gate, Layer
from ttt_cache.kernels.window import windowed_attention
from ttt_cache.kernels.window_inputs import Latents, Seen

SMALL = Layer(recent=7, chunk=4)
SHARE = 2.0
FEW = 16.0  # of a sum that is one number: what plain arithmetic happens to lose of it says little
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes and settings of one call."""

    layer: Layer = SMALL
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 32
    sinks: int = 0
    slots: int = 3
    latent_dim: int = 8
    gate: str = "joint"
    position: bool = False
    tokens: int = 41
    start: tuple[int, ...] = (0, 30)
    fresh: bool = False  # no columns of older tokens
    dtype: torch.dtype = torch.float32

    @property
    def history(self) -> int:
        return 0 if self.fresh else self.layer.capacity

    def seen(self) -> Seen:
        """Queries, keys and values as views of one projection, older columns before them."""
        together = self.heads + 2 * self.kv_heads
        batch, columns = len(self.start), self.history + self.tokens
        made = torch.randn(batch, columns, together, self.head_dim).to(self.dtype).transpose(1, 2)
        q, keys, values = made.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        turned = torch.randn(batch, self.heads, self.tokens, self.head_dim).to(self.dtype)
        sinks = torch.randn(2, batch, self.kv_heads, self.sinks, self.head_dim).to(self.dtype)
        return Seen(q[:, :, self.history :], turned, keys, values, *sinks, torch.tensor(self.start))

    def latents(self) -> Latents | None:
        if not self.slots:
            return None
        h, kv, d, e, m = self.heads, self.kv_heads, self.head_dim, self.latent_dim, self.slots
        versions = 2 + self.tokens // self.layer.chunk

        def learned(*shape: int, fan_in: int = 1) -> Tensor:
            return (torch.randn(shape) / math.sqrt(fan_in)).to(self.dtype)

        bias = None if self.gate == "fixed" else learned(1 if self.gate == "layer" else h)
        if bias is not None and self.gate == "residual":
            bias += bias.sign()  # the kernels' form of tanh is a difference, which cancels near 0
        gate = Gate(
            self.gate,
            alpha=0.7,
            bias=bias,
            weight=learned(h, d, fan_in=d) if self.gate == "query" else None,
        )
        return Latents(
            torch.randn(len(self.start), versions, m, e),
            learned(kv, d, e, fan_in=e),
            learned(kv, d, m, fan_in=d),
            learned(kv, e, d, fan_in=e),
            learned(h, m) if self.position else None,
            gate,
        )


FEW_QUERIES = {"tokens": 20}
CASES = {
    **{gate: Case(gate=gate, **FEW_QUERIES) for gate in GATES},
    "sinks": Case(sinks=2),
    "repeated": Case(heads=4, kv_heads=2, sinks=5, gate="query", tokens=17, start=(22,)),
    "window": Case(slots=0, tokens=70, start=(5,)),
    "window and sinks": Case(slots=0, sinks=3, heads=2, **FEW_QUERIES),
    "fresh": Case(fresh=True, start=(0, 0), position=True),
    "one token": Case(tokens=1, start=(0, 10, 14, 45_000)),
    "arrived": Case(layer=Layer(5, 4, arrived=True), sinks=2, **FEW_QUERIES),
    "every token": Case(layer=Layer(3, 1), slots=5, **FEW_QUERIES),
    "many slots": Case(slots=37, latent_dim=19, head_dim=48, position=True, tokens=9),
    "many tokens": Case(
        layer=Layer(63, 5), tokens=97, head_dim=64, latent_dim=35, start=(7,), slots=2
    ),
    "many sinks": Case(layer=Layer(40, 3), tokens=70, sinks=37, start=(20,), slots=0),
    "wide": Case(latent_dim=300, head_dim=80, tokens=7, slots=10, start=(13,)),
    "bfloat16": Case(dtype=torch.bfloat16, sinks=2, position=True, **FEW_QUERIES),
    "float16": Case(dtype=torch.float16, gate="query", heads=2, start=(30,), **FEW_QUERIES),
}


@pytest.fixture(autouse=True)
def _nothing_is_written() -> Iterator[None]:
    """Memory that is not written is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", CASES)
def test_one_call(name):
    case = CASES[name]
    torch.manual_seed(len(name))
    seen, latents = case.seen(), case.latents()
    back = torch.randn(*seen.q.shape[:2], case.tokens, case.head_dim).to(case.dtype)
    exact, plain = (
        outcome(reference.windowed_attention, case.layer, *in_dtype(dtype, seen, latents), back)
        for dtype in (torch.float64, case.dtype)
    )
    poison_hidden(seen, case.layer)
    found = outcome(windowed_attention, case.layer, *in_dtype(None, seen, latents), back)
    assert found.keys() == exact.keys() == plain.keys()
    shares = {}
    for of, actual in found.items():
        assert actual.dtype == plain[of].dtype
        shares[of] = assert_accurate(actual, exact[of], plain[of], SHARE if of != "bias" else FEW)
    print(name, {of: round(share, 2) for of, share in shares.items()})


def outcome(attention, layer: Layer, seen: Seen, latents: Latents | None, back: Tensor) -> Named:
    """The output, and gradients by everything that there is, by name."""
    named = {name: x for name, x in seen._asdict().items() if name != "start" and x.numel()}
    if latents is not None:
        named |= latents._asdict() | latents.gate._asdict()
    named = {name: x for name, x in named.items() if isinstance(x, Tensor)}
    for x in named.values():
        x.requires_grad_()
    y = attention(seen, layer, latents)
    used = [name for name in named if latents or seen.sink_keys.numel() or name != "q"]
    gradients = torch.autograd.grad(y, [named[name] for name in used], back.to(y.dtype))
    return {"y": y.detach()} | dict(zip(used, gradients, strict=True))


def in_dtype(
    dtype: torch.dtype | None, seen: Seen, latents: Latents | None
) -> tuple[Seen, Latents | None]:
    """The same numbers as other leaves, strides kept; read-outs are float32 or wider."""

    def cast(x):
        if not isinstance(x, Tensor):
            return x
        wide = dtype if x.is_floating_point() else None
        return x.detach().to(wide or x.dtype)

    seen = Seen(*map(cast, seen))
    if latents is None:
        return seen, None
    gate, readouts = Gate(*map(cast, latents.gate)), latents.readouts.detach()
    if dtype == torch.float64:
        readouts = readouts.double()
    return seen, Latents(readouts, *map(cast, latents[1:5]), gate)


def poison_hidden(seen: Seen, layer: Layer) -> None:
    """NaN into the columns and sinks that no query sees."""
    tokens, columns = seen.q.shape[2], seen.keys.shape[2]
    first, last = seen.start[:, None] + 1, seen.start[:, None] + tokens
    gone = [(n - layer.recent).clamp(min=0) // layer.leaving * layer.leaving for n in (first, last)]
    number = last - columns + torch.arange(1, columns + 1)
    sinks = torch.arange(seen.sink_keys.shape[2]) >= gone[1]
    hidden = (number <= gone[0], number <= gone[0], sinks, sinks)
    for tensor, where in zip(seen[2:6], hidden, strict=True):
        tensor.masked_fill_(where[:, None, :, None], math.nan)


def test_what_is_needed():
    """Without gradients, with some, and under autocast with weights of another dtype."""
    case = Case(dtype=torch.bfloat16, gate="query", tokens=5, start=(12,), heads=2)
    torch.manual_seed(0)
    seen, latents = in_dtype(None, case.seen(), case.latents())
    assert latents is not None
    with torch.no_grad():
        plain = windowed_attention(seen, case.layer, latents)
    wide = latents._replace(to_key=latents.to_key.float().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        y = windowed_attention(seen, case.layer, wide)
    assert torch.equal(y, plain) and y.transpose(1, 2).is_contiguous()
    (gradient,) = torch.autograd.grad(y.sum(), wide.to_key)
    assert gradient.dtype == torch.float32 and gradient.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_apart(value):
    """What is no number in one row changes no bit of another, there or on the way back."""
    case = Case(sinks=2, tokens=5, start=(30, 30))
    torch.manual_seed(0)
    seen, latents = case.seen(), case.latents()
    back = torch.randn(2, 1, case.tokens, case.head_dim)
    found = []
    for spoilt in (False, True):
        mine, memory = in_dtype(None, Seen(*(x.clone() for x in seen)), latents)
        if spoilt:
            for x in (*mine[:6], memory.readouts):
                x[0] = value
        made = outcome(windowed_attention, case.layer, mine, memory, back)
        found.append([made[name][1] for name in ("y", *Seen._fields[:6], "readouts")])
    for clean, beside in zip(*found, strict=True):
        assert torch.equal(clean, beside)
