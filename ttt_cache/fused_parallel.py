"""The parallel form in Triton kernels: the attention of a call, and the memory's scan.

Computes what `parallel.py` and `memory/chunks.py` do. Whether it can is for `backend.py` to say.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .form import Form
from .fused import gate_of, layer_of
from .kernels.memory_scan import memory_scan
from .kernels.window import windowed_attention
from .kernels.window_inputs import Latents, Seen
from .memory.chunks import Given, Versions
from .memory.tokens import LatentTokens
from .span import Span
from .windowed import Exact, joined

if TYPE_CHECKING:
    from .cache import HierarchicalCache


def attend(cache: HierarchicalCache, exact: Exact, readouts: Tensor | None, span: Span) -> Tensor:
    """As `ttt_cache.windowed.attend`, with new keys after RoPE."""
    q, start = exact.q, span.start.expand(len(exact.q)).contiguous()
    # Under autocast what is new may be narrower than the state.
    old = (z.to(q.dtype) for z in exact[3:])
    old_keys, old_values, sink_keys, sink_values = old
    seen = Seen(
        q=q,
        turned_q=cache.turn(q, start),
        keys=joined(old_keys, exact.k),
        values=joined(old_values, exact.v),
        sink_keys=sink_keys,
        sink_values=sink_values,
        start=start,
    )
    latents = None
    if readouts is not None and not cache.config.reset_memory:
        latents = _latents(cache, readouts)
    return windowed_attention(seen, layer_of(cache), latents)


def _latents(cache: HierarchicalCache, readouts: Tensor) -> Latents:
    reader = cache.reader
    assert isinstance(reader, LatentTokens)
    return Latents(
        readouts=readouts,
        to_key=reader.to_key,
        slot_key=reader.slot_key,
        to_value=reader.to_value,
        slot_bias=None if reader.position == "none" else reader.bias(),
        gate=gate_of(cache),
    )


def run(given: Given) -> Versions:
    """As `ttt_cache.memory.chunks.run`, for at most one hidden layer."""
    rule = given.rule
    parts = (given.hidden, given.totals, rule.rates, rule.norms)
    first, total, rate, norm = (part[0] if part else None for part in parts)
    chunk, hidden = given.chunks, bool(given.hidden)
    found = memory_scan(
        chunk.k, chunk.v, chunk.eta, first, given.last, total, rate, norm,
        given.closes, rule.size, rule.cap,
    )  # fmt: skip
    firsts, lasts, end_first, end_last, end_total = found
    several = [([one] if hidden else []) for one in (firsts, end_first, end_total)]
    return Versions(several[0], lasts, (several[1], end_last, several[2]))


# Launches cost more than bytes here, so parts are larger; and the weights of every chunk would be
# more than all else that attention keeps, while a scan in kernels is made again at no great cost.
KERNELS = Form(attend, lambda _: True, run, part=2**26, scans_again=True)
