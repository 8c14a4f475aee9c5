"""Who sees whom in the training attention: `docs/semantics.md` in indices.

Query i of a row is token `start + i + 1`, column j of its window token `start + j + 1 - history`.
Virtual tokens of all versions stand in a row, M of each. Index tensors may have any shapes that
broadcast.
"""

import triton
import triton.language as tl

from .constant import constexpr


@triton.jit
def evicted(token, s: constexpr):
    """How many tokens have left the window when one asks."""
    return tl.maximum(token - s.recent, 0) // s.leaving * s.leaving


@triton.jit
def version(token, s: constexpr):
    """The newest version of the memory when a token asks; 0 is never read."""
    return tl.maximum(token - s.wait, 0) // s.chunk


@triton.jit
def sees(i, j, start, history, sinks: constexpr, s: constexpr):
    """Whether queries see columns of the window, or sinks."""
    gone = evicted(start + i + 1, s)
    if sinks:
        return (j < gone) & (j < s.sinks)
    return (start + j + 1 - history > gone) & (j - history <= i)


@triton.jit
def columns_seen(first, count, start, history, sinks: constexpr, s: constexpr):
    """The columns, or sinks, that `count` queries from the `first` on may see: from, to."""
    last = first + count
    if sinks:
        return 0, tl.minimum(evicted(start + last, s), s.sinks)
    return tl.maximum(history - start + evicted(start + first + 1, s), 0), history + last


@triton.jit
def queries_seeing(first, count, start, history, tokens, s: constexpr):
    """The queries that may see `count` columns of the window from the `first` on: from, to."""
    last = start + first + count - history  # the number of the last of them
    # The first token for which it has left: evicted(n) >= last.
    stop = s.recent + (last + s.leaving - 1) // s.leaving * s.leaving
    stop = tl.where(last > 0, stop - start - 1, 0)
    return tl.maximum(first - history, 0), tl.minimum(stop, tokens)


@triton.jit
def reads(i, u, start, versions, s: constexpr):
    """Which slot of its version a virtual token is to a query, and whether the query reads it."""
    newest = version(start + i + 1, s)
    slot = u - tl.minimum(newest - version(start, s), versions - 1) * s.slots
    return slot, (slot >= 0) & (slot < s.slots) & (newest > 0)


@triton.jit
def virtual_seen(first, count, start, versions, s: constexpr):
    """The virtual tokens that `count` queries from the `first` on may read: from, to."""
    newest = version(start + first + count, s)
    old = tl.minimum(version(start + first + 1, s) - version(start, s), versions - 1)
    new = tl.minimum(newest - version(start, s), versions - 1)
    return old * s.slots, tl.where(newest > 0, (new + 1) * s.slots, 0)


@triton.jit
def queries_reading(first, count, start, versions, tokens, s: constexpr):
    """The queries that may read `count` virtual tokens from the `first` on: from, to."""
    old, new = first // s.slots, (first + count - 1) // s.slots
    # Version i is met by the tokens from `wait + i chunk` on.
    begin = s.wait + (version(start, s) + old) * s.chunk - start - 1
    stop = s.wait + (version(start, s) + new + 1) * s.chunk - start - 1
    stop = tl.where(new < versions - 1, stop, tokens)
    return tl.maximum(tl.where(old > 0, begin, 0), 0), tl.minimum(stop, tokens)
