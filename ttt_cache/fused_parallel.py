"""The parallel form in Triton kernels: the attention of a call, and the memory's scan.

Computes what `windowed.py` and `memory/chunks.py` do. Whether it can is for `backend.py` to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from .blocks import WHOLE, Part, blockwise, heads
from .form import Form
from .fused import gate_of, layer_of
from .kernels.checks import check_head_dim
from .kernels.inputs import Gate
from .kernels.memory_scan import memory_scan
from .kernels.memory_scan_inputs import check_scan_sizes
from .kernels.window import windowed_attention
from .kernels.window_checks import check_latent_sizes
from .kernels.window_inputs import Latents, Seen
from .memory import TTT
from .memory.chunks import Given, Versions
from .memory.tokens import LatentTokens
from .span import Span
from .windowed import Exact, joined

if TYPE_CHECKING:
    from .cache import HierarchicalCache

Group = tuple[slice, slice]
"""Some query heads, and the key heads that they share."""


def check_sizes(cache: HierarchicalCache) -> None:
    """Raise `ValueError` where a call of some length could not be computed."""
    check_head_dim(cache.head_dim)
    memory, reader = cache.memory, cache.reader
    if isinstance(memory, TTT) and isinstance(reader, LatentTokens):
        check_scan_sizes(
            memory.head_dim, memory.fast.layers[memory.fast.last].shape[1], memory.chunk
        )
        check_latent_sizes(reader.slots, memory.latent_dim)


def attend(cache: HierarchicalCache, exact: Exact, readouts: Tensor | None, span: Span) -> Tensor:
    """As `ttt_cache.windowed.attend`.

    Some heads after the other: read-outs are wider than a head, so that queries absorbed for all
    heads at once, and their gradients, would be the most that a training step has to hold.
    """
    start = span.start.expand(len(exact.q)).contiguous()
    memory = _memory(cache, readouts)
    reads = bool(memory) and not cache.config.reset_memory

    def some(_: Group, *given: Tensor) -> Tensor:
        seen = _seen(cache, Exact(*given[:7]), start)
        latents = _latents(cache, dict(zip(memory, given[7:], strict=True))) if reads else None
        return windowed_attention(seen, layer_of(cache), latents)

    latent_dim = memory["to_key"].shape[2] if memory else 0
    cuts = [
        (group, (*_of_heads(*group), *(_of_memory(name, memory[name], *group) for name in memory)))
        for group in _groups(cache, latent_dim)
    ]
    return blockwise(some, cuts, *exact, *memory.values())


def _groups(cache: HierarchicalCache, latent_dim: int) -> Iterator[Group]:
    """Heads that go together: what they ask a memory is a quarter of all heads' queries in size."""
    kv_heads, repeat = cache.kv_heads, cache.num_heads // cache.kv_heads
    most = max(1, cache.kv_heads * cache.head_dim // (4 * max(latent_dim, 1)))
    size = max(size for size in range(1, kv_heads + 1) if kv_heads % size == 0 and size <= most)
    for first in range(0, kv_heads, size):
        last = first + size
        yield slice(first * repeat, last * repeat), slice(first, last)


def _of_heads(queries: slice, keys: slice) -> tuple[Part, ...]:
    return (heads(queries), *[heads(keys)] * 6)


def _of_memory(name: str, tensor: Tensor, queries: slice, keys: slice) -> Part:
    """Which part of what `_memory` names goes with a group."""
    if name == "readouts" or (name == "bias" and len(tensor) == 1):  # of a whole layer
        return WHOLE
    return (keys if name in ("to_key", "slot_key", "to_value") else queries,)


def _seen(cache: HierarchicalCache, exact: Exact, start: Tensor) -> Seen:
    q, k = cache.rotate(exact.q, exact.k, start)
    # Under autocast what is new may be narrower than the state.
    old_keys, old_values, sink_keys, sink_values = (z.to(q.dtype) for z in exact[3:])
    keys, values = joined(old_keys, k), joined(old_values, exact.v)
    return Seen(exact.q, q, keys, values, sink_keys, sink_values, start)


def _memory(cache: HierarchicalCache, readouts: Tensor | None) -> dict[str, Tensor]:
    """Everything that gradients go to when a memory is read, by name."""
    if readouts is None:
        return {}
    reader, gate = cache.reader, gate_of(cache)
    assert isinstance(reader, LatentTokens)
    named = {
        "readouts": readouts,
        "to_key": reader.to_key,
        "slot_key": reader.slot_key,
        "to_value": reader.to_value,
        "slot_bias": None if reader.position == "none" else reader.bias(),
        "bias": gate.bias,
        "weight": gate.weight,
    }
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _latents(cache: HierarchicalCache, memory: dict[str, Tensor]) -> Latents:
    gate = gate_of(cache)
    return Latents(
        readouts=memory["readouts"],
        to_key=memory["to_key"],
        slot_key=memory["slot_key"],
        to_value=memory["to_value"],
        slot_bias=memory.get("slot_bias"),
        gate=Gate(gate.kind, gate.alpha, memory.get("bias"), memory.get("weight")),
    )


def run(given: Given) -> Versions:
    """As `ttt_cache.memory.chunks.run`, for at most one hidden layer."""
    rule, chunk = given.rule, given.chunks
    parts = (given.hidden, given.totals, rule.rates, rule.norms)
    first, total, rate, norm = (part[0] if part else None for part in parts)
    firsts, lasts, end_first, end_last, end_total = memory_scan(
        chunk.k, chunk.v, chunk.eta, first, given.last, total, rate, norm,
        given.closes, rule.size, rule.cap,
    )  # fmt: skip
    several = [[] if one is None else [one] for one in (firsts, end_first, end_total)]
    return Versions(several[0], lasts, (several[1], end_last, several[2]))


def turns_once(_: HierarchicalCache) -> bool:
    """Each group of heads turns its own keys."""
    return False


# The weights after every chunk would be most of what attention keeps for the way back.
KERNELS = Form(attend, turns_once, run, scans_again=True)
