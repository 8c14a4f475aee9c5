"""Chunk after chunk through a network, keeping nothing but the weights of every version.

Autograd would keep every step of every chunk and go back through them one small operation at a
time. Here what a chunk did is made again for all chunks at once, and only the recurrence of the
gradient itself (`ttt_cache.memory.adjoint`) goes back chunk by chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.once import first_order
from ..precision import full_precision
from . import adjoint, delta
from .delta import Chunk, Rule


class Given(NamedTuple):
    """K chunks for N networks.

    Attributes:
        chunks: tensors `[K, N, C, *]`. A token of zeros in k and v changes nothing.
        hidden, last: weights at the start, `[N, rows, columns]`.
        totals: gradients by the hidden layers of tokens of the first chunk taken in before.
        rule: how a chunk closes.
        closes: which networks end which chunk, bool `[K, N, 1, 1]`. After a chunk that it does not
            end a network has no tokens.
    """

    chunks: Chunk
    hidden: list[Tensor]
    last: Tensor
    totals: list[Tensor]
    rule: Rule
    closes: Tensor


class Versions(NamedTuple):
    """What a run makes.

    Attributes:
        hidden, last: the weights after each chunk, `[K, N, rows, columns]`.
        end: the weights and the totals after all, as `Given` has them at the start.
    """

    hidden: list[Tensor]
    last: Tensor
    end: tuple[list[Tensor], Tensor, list[Tensor]]


def run(given: Given) -> Versions:
    """Take in all chunks, one after the other; differentiable by every tensor."""
    rule, depth = given.rule, len(given.hidden)
    tensors = (*given.chunks, given.last)
    for each in (given.hidden, given.totals, rule.rates, rule.norms):
        tensors += tuple(each)
    found = _Run.apply(rule.size, rule.cap, given.closes, *tensors)
    assert found is not None
    last, end, *rest = found
    hidden, ends, totals = (rest[i * depth : (i + 1) * depth] for i in range(3))
    return Versions(hidden, last, (ends, end, totals))


def _sorted(size: int, cap: float, closes: Tensor, tensors: tuple[Tensor, ...]) -> Given:
    """What `run` was given, of what it hands to autograd."""
    k, v, eta, last, *rest = tensors
    depth = len(rest) // 4
    hidden, totals, rates, norms = (rest[i * depth : (i + 1) * depth] for i in range(4))
    return Given(Chunk(k, v, eta), hidden, last, totals, Rule(size, cap, rates, norms), closes)


class _Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, size: int, cap: float, closes: Tensor, *tensors: Tensor):
        given = _sorted(size, cap, closes, tensors)
        hidden, last, totals = given.hidden, given.last, given.totals
        versions = [w.new_empty(closes.shape[0], *w.shape) for w in (last, *hidden)]
        for i, (k, v, eta, ends) in enumerate(zip(*given.chunks, closes, strict=True)):
            chunk = Chunk(k, v, eta)
            learned = delta.learn(chunk, hidden, last, delta.predict(chunk, hidden, last))
            totals = [old + g for old, g in zip(totals, learned.gradients, strict=True)]
            hidden, last = delta.close(hidden, learned.last, totals, given.rule, ends)
            totals = [torch.where(ends, 0, total) for total in totals]
            for stack, new in zip(versions, (last, *hidden), strict=True):
                stack[i] = new
        ctx.size, ctx.cap = size, cap
        ctx.save_for_backward(closes, *versions, *tensors)
        return (versions[0], last, *versions[1:], *hidden, *totals)

    @staticmethod
    @first_order
    def backward(ctx: Any, *by_outputs: Tensor):  # type: ignore[override]
        depth = (len(by_outputs) - 2) // 3
        closes, last, *rest = ctx.saved_tensors
        hidden, tensors = rest[:depth], tuple(rest[depth:])
        given = _sorted(ctx.size, ctx.cap, closes, tensors)
        # A version is what its chunk left; what a chunk began with is the version before.
        last, *hidden = (
            torch.cat([start[None], after[:-1]])
            for start, after in zip((given.last, *given.hidden), (last, *hidden), strict=True)
        )
        by_last, by_end, *rest = by_outputs
        by_hidden, by_ends, by_totals = (rest[i * depth : (i + 1) * depth] for i in range(3))
        with full_precision(last):  # who goes back under autocast would narrow what runs here
            again = adjoint.Run(given.chunks, hidden, last, given.totals, given.rule, closes)
            by = again.back(by_hidden, by_last, (by_ends, by_end, by_totals))
        return None, None, None, *by.chunks, by.last, *by.hidden, *by.totals, *by.rates, *by.norms
