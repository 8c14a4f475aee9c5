"""What the tests of the training attention share: sizes, numbers, gradients by name."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ttt_cache.kernels.inputs import Gate, Layer
from ttt_cache.kernels.window_inputs import Latents, Seen

SMALL = Layer(recent=7, chunk=4)
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
