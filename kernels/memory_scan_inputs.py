"""What a scan of the memory is given and makes, and what is refused."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import INSTEAD, expect
from .memory_step import HIDDEN, WIDTHS

TOKENS = range(1, 17)  # of a chunk


class Scan(NamedTuple):
    """What a scan is given, as `memory_scan` documents it; without gaps."""

    k: Tensor
    v: Tensor
    eta: Tensor
    first: Tensor | None
    last: Tensor
    total: Tensor | None
    rate: Tensor | None
    norm: Tensor | None
    closes: Tensor
    chunk: int
    cap: float


class Made(NamedTuple):
    """What a scan makes: the weights after each chunk, and W1's gradient at the end."""

    firsts: Tensor | None
    lasts: Tensor
    total: Tensor | None


class By(NamedTuple):
    """Gradients by what a scan made."""

    firsts: Tensor | None
    lasts: Tensor
    end_first: Tensor | None
    end_last: Tensor
    end_total: Tensor | None


def check_scan_sizes(d: int, n: int, tokens: int) -> None:
    """Raise `ValueError` unless the kernels can do chunks of so many tokens, `[d, n]` weights."""
    if d not in WIDTHS or n not in HIDDEN or tokens not in TOKENS:
        raise ValueError(
            "memory_dim must be from 16 to 128, hidden_dim from 16 to 256 and a chunk's tokens "
            f"from 1 to 16, got {d}, {n} and {tokens}{INSTEAD}"
        )


def check_scan(scan: Scan) -> None:
    """Raise `ValueError` where an argument does not fit the others or is not supported."""
    if scan.k.dim() != 4:
        raise ValueError(f"k must be [K, N, L, d], got {tuple(scan.k.shape)}")
    chunks, nets, tokens, d = scan.k.shape
    n = scan.last.shape[-2]
    check_scan_sizes(d, n, tokens)
    if not chunks:
        raise ValueError("k must have a chunk at least, got none")
    hidden = {
        "first": (scan.first, (nets, d, n)),
        "total": (scan.total, (nets, d, n)),
        "rate": (scan.rate, (nets, 1, 1)),
        "norm": (scan.norm, (nets, 1, n)),
    }
    given = [name for name, (tensor, _) in hidden.items() if tensor is not None]
    if given and len(given) < len(hidden):
        raise ValueError(f"a memory has all of {', '.join(hidden)} or none, got {given}")
    every = hidden | {
        "k": (scan.k, (chunks, nets, tokens, d)),
        "v": (scan.v, (chunks, nets, tokens, d)),
        "eta": (scan.eta, (chunks, nets, tokens, 1)),
        "last": (scan.last, (nets, n if given else d, d)),
    }
    for name, (tensor, shape) in every.items():
        if tensor is not None:
            expect(name, tensor, shape, torch.float32, packed=0)
    expect("closes", scan.closes, (chunks, nets, 1, 1), torch.bool, packed=0)
