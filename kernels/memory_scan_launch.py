"""What the kernels of the memory scan are started with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import Launch
from .memory_scan_again import memory_scan_again_kernel
from .memory_scan_back import memory_scan_back_kernel
from .memory_scan_inputs import By, Made, Scan
from .memory_scan_kernel import memory_scan_kernel
from .memory_scan_tiles import ScanSizes
from .memory_scan_tokens import memory_scan_tokens_kernel
from .sizes import power_of_2

LEAST = 16  # of a side of a tile: the least that `tl.dot` takes
TILE = 4096  # elements of a matrix that is worked on at a time
TIGHT = 2048  # the same on the way back, which has more of them at hand
DEPTH = 32  # of its columns, in products that sum over them
# One stage: a pass through weights is a few tiles long, nothing to load ahead of. All registers
# that a thread can have: left to itself the assembler spills, for two programs to share a
# multiprocessor.
OPTIONS = {"num_warps": 8, "num_stages": 1, "maxnreg": 255}
PARTS, PAIRS, COLUMNS, NUMBERS = 8, 3, 3, 6  # that the way back keeps, see `memory_scan_again.py`
BY_RATE, BY_NORM = 5, 1  # where the way back leaves them, in NUMBERS and COLUMNS


class Found(NamedTuple):
    """What the kernels of the way back leave, from which the gradients are taken."""

    by_k: Tensor
    by_v: Tensor
    by_eta: Tensor
    by_first: Tensor | None
    by_last: Tensor
    by_totals: Tensor | None  # [K, N, d, n]
    columns: Tensor
    numbers: Tensor

    def gradients(self) -> tuple[Tensor | None, ...]:
        """By k, v, eta, first, last, total, rate and norm."""
        tokens = self.by_k, self.by_v, self.by_eta
        if self.by_totals is None:
            return *tokens, None, self.by_last, None, None, None
        rate = self.numbers[..., BY_RATE].sum(0)[:, None, None]
        norm = self.columns[:, :, BY_NORM].sum(0)[:, None]
        return *tokens, self.by_first, self.by_last, self.by_totals[0], rate, norm


def scan_launch(scan: Scan) -> tuple[Launch, Made]:
    """The launch of a scan, and what it fills; its tensors may be on any device."""
    sizes = _sizes(scan)
    chunks, nets = scan.closes.shape[:2]
    lasts = scan.last.new_empty(chunks, *scan.last.shape)
    firsts, total = None, None
    if scan.first is not None:
        firsts = lasts.new_empty(chunks, *scan.first.shape)
        total = torch.empty_like(scan.first)
    made = Made(firsts, lasts, total)
    arguments = _arguments(scan) | {
        "firsts": _or(firsts, lasts),
        "lasts": lasts,
        "end_total": _or(total, lasts),
        "scratch": lasts.new_empty(nets, sizes.tokens, 3 * sizes.n + sizes.d),
        "chunks": chunks,
        "s": sizes,
    }
    return Launch(memory_scan_kernel, (nets,), arguments, OPTIONS), made


def back_launches(scan: Scan, made: Made, by: By) -> tuple[list[Launch], Found]:
    """The launches of the way back, in order, and what they fill."""
    sizes, every = _sizes(scan), scan.closes.shape[:2]
    kept, found = _room(scan, made, sizes)
    given = _arguments(scan) | {"firsts": _or(made.firsts, made.lasts), "lasts": made.lasts}
    pulled = torch.empty_like(scan.v)
    shared = {"by_totals": _or(found.by_totals, found.by_last), "by_v": found.by_v}
    names = ("k", "eta", "first", "last", "total", "closes", "firsts", "lasts")
    chain = {name: given[name] for name in names} | kept | shared
    chain |= {
        "by_firsts": _or(by.firsts, by.lasts),
        "by_lasts": by.lasts,
        "by_end_first": _or(by.end_first, by.end_last),
        "by_end_last": by.end_last,
        "by_end_total": _or(by.end_total, by.end_last),
        "by_first": _or(found.by_first, found.by_last),
        "by_last": found.by_last,
        "pulled_to": pulled,
        "chunks": every[0],
        "s": _sizes(scan, TIGHT),
    }
    rest = {name: given[name] for name in ("first", "firsts")}
    rest |= {name: kept[name] for name in ("units", "pairs", "errors")} | shared
    rest |= {"pulled": pulled, "by_k": found.by_k, "by_eta": found.by_eta, "s": sizes}
    return [
        Launch(memory_scan_again_kernel, every, given | kept | {"s": sizes}, OPTIONS),
        Launch(memory_scan_back_kernel, every[1:], chain, OPTIONS),
        Launch(memory_scan_tokens_kernel, every, rest, OPTIONS),
    ], found


def _room(scan: Scan, made: Made, sizes: ScanSizes) -> tuple[dict[str, Tensor], Found]:
    """Room for what is made again, and for gradients."""
    last, every, tokens = scan.last, scan.closes.shape[:2], sizes.tokens
    kept = {
        "units": last.new_empty(*every, 1 if sizes.linear else PARTS, tokens, sizes.n),
        "pairs": last.new_empty(*every, PAIRS, tokens, tokens),
        "columns": last.new_empty(*every, COLUMNS, sizes.n),
        "numbers": last.new_empty(*every, NUMBERS),
        "errors": torch.empty_like(scan.v),
        "alongs": last.new_empty(*every, tokens),
    }
    return kept, Found(
        # The features of a linear memory are the keys.
        by_k=kept["units"][:, :, 0] if scan.first is None else torch.empty_like(scan.k),
        by_v=torch.empty_like(scan.v),
        by_eta=torch.empty_like(scan.eta),
        by_first=None if scan.first is None else torch.empty_like(scan.first),
        by_last=torch.empty_like(last),
        by_totals=None if made.firsts is None else torch.empty_like(made.firsts),
        columns=kept["columns"],
        numbers=kept["numbers"],
    )


def _arguments(scan: Scan) -> dict[str, Tensor]:
    """What kernels are given of a scan; a linear memory's are compiled without what it lacks."""
    names = ("k", "v", "eta", "first", "last", "total", "rate", "norm", "closes")
    return {name: _or(getattr(scan, name), scan.last) for name in names}


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    return stand_in if tensor is None else tensor


def _sizes(scan: Scan, tile: int = TILE) -> ScanSizes:
    tokens, d = scan.k.shape[2:]
    n = scan.last.shape[1]
    block_d, block_n = power_of_2(d), max(power_of_2(n), 2 * LEAST)
    return ScanSizes(
        d=d,
        n=n,
        tokens=tokens,
        chunk=scan.chunk,
        linear=scan.first is None,
        cap=float(scan.cap),
        block_l=max(power_of_2(tokens), LEAST),
        block_d=block_d,
        block_n=block_n,
        # Two turns at least: a loop of one dissolves into its neighbours, and spills.
        units=min(block_n // 2, tile // block_d),
        depth=min(block_d, block_n, DEPTH),
        levels=(tokens - 1).bit_length(),
    )
