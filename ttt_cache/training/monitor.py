"""What a memory does while it is trained: how open its gate is, and what reaches the output.

A memory may be written, read and trained and still have no say, because its gate never opened or
its branch drowns the other. Loss alone does not show that; these three figures do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ttt_cache.cache import HierarchicalCache
from ttt_cache.memory import QueryReader, VirtualTokens
from ttt_cache.patch import Patch
from ttt_cache.precision import widened
from ttt_cache.state import CacheState
from ttt_cache.targets import refuse_streaming


@dataclass(frozen=True)
class Observed:
    """What one layer's memory does.

    Attributes:
        gate: how far its gate is open, from the gate's weights alone: the mean of `sigmoid(b)`
            (`joint`), `|tanh(a)|` (`residual`) or `1 - alpha` (the others; `query` at a query of
            zero). 1 without a window, 0 without a memory.
        mass: share of a query that goes to the memory, averaged over rows, heads and the tokens
            that read a written memory: softmax weight on virtual tokens (`joint`), `|tanh(a)|`
            (`residual`), `1 - alpha` (the others). 0 where no token reads one.
        ratio: root mean square of what the memory adds to the output over that of what the window
            adds, both after the gate, over the same tokens. 1 where there is no window's branch to
            compare with, 0 where no token reads a memory.
    """

    gate: float
    mass: float
    ratio: float


@torch.no_grad()
def observe(
    handle: Patch, run: Callable[[], object], counts: Tensor | None = None
) -> dict[int, Observed]:
    """Run a patched model once and look at every layer's memory.

    Each patched attention core runs a second time, with its memory's branch taken out, so that
    both branches are measured and neither is a difference of rounded numbers. Nothing of the model
    changes: no weights, no gradients, no state, no random numbers.

    Args:
        run: calls the model, not streaming; several calls, such as the segments of a recording,
            are averaged over all their tokens.
        counts: bool `[B, T]`, the tokens of every call that are not padding; all by default.

    Returns:
        by layer, in order.

    Raises:
        RuntimeError: the model is streaming, or `run` does not reach every patched layer.
    """
    refuse_streaming(handle.transformer, handle.transformer, "observed")
    sums = {layer: _Sums() for layer in sorted(handle.layers)}
    with ExitStack() as stack:
        for layer, total in sums.items():
            cache = handle.caches[layer]
            hook = cache.register_forward_hook(_adds_to(total, counts), with_kwargs=True)
            stack.callback(hook.remove)
        run()
    missed = [layer for layer, total in sums.items() if not total.calls]
    if missed:
        raise RuntimeError(f"run did not reach the caches of layers {missed}")
    return {layer: total.observed(handle.caches[layer]) for layer, total in sums.items()}


def figures_of(observed: Mapping[int, Observed]) -> dict[str, float]:
    """As named figures for a recorder: `gate/25`, `mass/25`, `ratio/25`."""
    figures = {}
    for layer, seen in observed.items():
        figures |= {f"{name}/{layer}": value for name, value in vars(seen).items()}
    return figures


class _Sums:
    """Over the calls of one layer; tensors, so that looking does not wait for a GPU."""

    def __init__(self) -> None:
        self.calls = 0
        self.mass: Tensor | float = 0.0
        self.queries: Tensor | float = 0.0
        self.memory: Tensor | float = 0.0  # squares
        self.window: Tensor | float = 0.0

    def observed(self, cache: HierarchicalCache) -> Observed:
        queries, memory, window = float(self.queries), float(self.memory), float(self.window)
        mass = float(self.mass) / queries if queries else 0.0
        compared = (memory / window) ** 0.5 if window else float(queries > 0)
        return Observed(openness(cache), mass, compared)


def openness(cache: HierarchicalCache) -> float:
    """How far the gate is open, from its weights alone: `Observed.gate`."""
    gate = cache.gate
    if gate is None:
        return float(cache.memory is not None)
    if gate.kind == "fixed":
        return 1 - gate.alpha
    bias = widened(gate.bias)
    if gate.kind == "residual":
        return float(bias.tanh().abs().mean())
    return float(torch.sigmoid(bias if gate.kind == "joint" else -bias).mean())


def _adds_to(total: _Sums, counts: Tensor | None) -> Callable[..., None]:
    def hook(
        cache: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
    ) -> None:
        assert isinstance(cache, HierarchicalCache)
        total.calls += 1
        if cache.reader is not None:
            _look(cache, total, counts, *args, **kwargs)

    return hook


def _look(
    cache: HierarchicalCache,
    total: _Sums,
    counts: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor,
    state: CacheState | None = None,
) -> None:
    """Add one call to the sums."""
    start = torch.zeros(1, dtype=torch.long, device=q.device) if state is None else state.count
    tokens = start[:, None] + torch.arange(1, q.shape[2] + 1, device=q.device)
    written = cache.written(tokens).expand(q.shape[0], -1)
    counted = (written if counts is None else written & counts)[:, None, None, :, None]
    with _without_memory(cache) as taken:
        # The method, not the module: other hooks need not hear of it.
        window = cache.by_key_head(widened(cache.forward(q, k, v, x, state)[0]))
    share, memory = _memory_branch(cache, taken, written[:, None, None, :, None], q)
    total.queries += counted.sum() * cache.num_heads
    total.mass += share.abs().masked_fill(~counted, 0).sum()
    total.memory += memory.square().masked_fill(~counted, 0).sum()
    total.window += window.square().masked_fill(~counted, 0).sum()


def _memory_branch(
    cache: HierarchicalCache, taken: list[Tensor], written: Tensor, q: Tensor
) -> tuple[Tensor, Tensor]:
    """The memory's share of each query and what it adds to the output.

    Returns:
        `[B, Hkv, R, T, 1]` and `[B, Hkv, R, T, D]`, or what broadcasts to it, float32 or wider.
    """
    if isinstance(cache.reader, VirtualTokens):
        # Block by block of queries, in groups of one chunk, the last one padded at the end.
        flat = [widened(z.flatten(3, 4)) for z in taken]
        weights, added = (torch.cat(flat[i::2], dim=3)[:, :, :, : q.shape[2]] for i in (0, 1))
        return weights.sum(-1, keepdim=True), added
    (answered,) = taken
    answered = cache.by_key_head(widened(answered))
    if cache.gate is None:
        return torch.ones_like(answered[..., :1]), answered
    _, share = cache.gate.shares(written, cache.by_key_head(q))
    return share.expand_as(answered[..., :1]), share * answered


@contextmanager
def _without_memory(cache: HierarchicalCache) -> Iterator[list[Tensor]]:
    """Within it the memory adds zeros to what the cache answers; what it would add is kept.

    Yields:
        after a call, with virtual tokens `[weights, what they add, ...]` of every block of
        queries, else `[the memory's answer]`.
    """
    reader, taken = cache.reader, []

    def mix(weights: Tensor, readout: Tensor) -> Tensor:
        assert isinstance(reader, VirtualTokens)
        taken.extend([weights, type(reader).mix(reader, weights, readout)])
        return torch.zeros_like(taken[-1])

    def output(answers: Tensor, dtype: torch.dtype) -> Tensor:
        assert isinstance(reader, QueryReader)
        taken.append(type(reader).output(reader, answers, dtype))
        return torch.zeros_like(taken[0])

    instead = output if isinstance(reader, QueryReader) else mix
    vars(reader)[instead.__name__] = instead
    try:
        yield taken
    finally:
        del vars(reader)[instead.__name__]
