"""What the training attention's kernels are compiled for: sizes of a layer, and of tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from triton import knobs

from .inputs import Layer
from .sizes import power_of_2
from .window_inputs import Latents, Seen

OPERANDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
TILE = 16384  # bytes of a tile of keys, of values, of latents, or of what is multiplied with them
# Widths of a factor that is held whole, or else of its parts: in 32 bits tensor cores take each
# number in two registers.
WHOLE = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 0}
PART = {torch.bfloat16: 128, torch.float16: 128, torch.float32: 16}
MOST = 64  # tokens of a tile: a window is not much wider
LEAST = 16  # tensor cores take no less


@dataclass(frozen=True)
class Sizes:
    """Everything that is known when the kernels are compiled; symbols as in `docs/semantics.md`.

    Fields only: a property's code would be no part of the key under which Triton keeps kernels.

    Attributes:
        heads, repeat, d: query heads H, query heads per key head R, their width D.
        sinks: S.
        slots, e: virtual tokens M, 0 for none, and the width of their latents, E.
        lead: where the slots' part of an absorbed query begins; E and what alignment needs.
        width: of an absorbed query.
        recent, leaving, wait, chunk: tokens kept exactly; leaving together; waiting for the memory;
            making a version.
        gate: its kind.
        operand: what tensor cores multiply; float32 in the interpreter, whose bfloat16 is wrong.
        block_q, block_k, block_s, block_u: queries, columns, sinks, virtual tokens of a tile.
        block_c: columns of a tile of which gradients are made.
        whole, part: the widest factor of scores that is held whole; of a wider one, one part of so
            much after the other.
        block_m, block_d, block_e: the powers of two that hold M's part of an absorbed query, D, E.
    """

    heads: int
    repeat: int
    d: int
    sinks: int
    slots: int
    e: int
    lead: int
    width: int
    recent: int
    leaving: int
    wait: int
    chunk: int
    gate: str
    operand: Any
    block_q: int
    block_k: int
    block_s: int
    block_u: int
    block_c: int
    whole: int
    part: int
    block_m: int
    block_d: int
    block_e: int

    @classmethod
    def of(cls, seen: Seen, layer: Layer, latents: Latents | None) -> Sizes:
        """Chosen from shapes alone."""
        heads, d = seen.q.shape[1], seen.q.shape[3]
        sinks, dtype = seen.sink_keys.shape[2], seen.q.dtype
        slots, e = (0, 0) if latents is None else latents.readouts.shape[2:]
        block_d, block_e = block(d), block(e)
        lead, behind = aligned(e), aligned(slots)
        tile, most = TILE // dtype.itemsize, MOST
        return cls(
            heads=heads,
            repeat=heads // seen.keys.shape[1],
            d=d,
            sinks=sinks,
            slots=slots,
            e=e,
            lead=lead,
            width=lead + behind,
            recent=layer.recent,
            leaving=layer.leaving,
            wait=0 if layer.arrived else layer.recent,
            chunk=layer.chunk,
            gate="none" if latents is None else latents.gate.kind,
            operand=tl.float32 if knobs.runtime.interpret else OPERANDS[dtype],
            block_q=min(most // 2 if slots else most, max(tile // max(block_d, block_e), LEAST)),
            block_k=min(most, tile // block_d),
            block_c=max(min(most, tile // block_d) // 2, LEAST),
            block_s=min(most // 2, block(sinks)),
            block_u=min(most // 2, max(tile // block_e, LEAST)),
            whole=WHOLE[dtype],
            part=PART[dtype],
            block_m=block(behind),
            block_d=block_d,
            block_e=block_e,
        )


def block(size: int) -> int:
    """The power of two that holds a width, of a tile that tensor cores take."""
    return max(power_of_2(max(size, 1)), LEAST)


def aligned(size: int) -> int:
    """A width after which loads of 128 bits may go on in any dtype."""
    return -(-size // LEAST) * LEAST
