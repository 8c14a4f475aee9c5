"""Softmax over tiles, online: each lane of a tile keeps a softmax of its own until the end.

A tile is some slots of a ring, their keys and their values. The usual form (Milakov and
Gimelshein, arXiv 1805.02867) folds every tile into one maximum and one sum, which makes all threads
wait for each other. Here lane i of every tile belongs to one softmax of its own, `(top, mass,
total)` with `mass = sum exp(score - top)` and `total = sum exp(score - top) value`; the lanes are
folded into one when the last tile is through. So are the parts of a window that programs shared.
"""

import triton
import triton.language as tl

from .constant import constexpr

# Below any score, but no infinity: the difference of two infinities would be NaN.
FLOOR = tl.constexpr(-3.0e38)


@triton.jit
def no_softmax(lanes: constexpr, width: constexpr):
    """Lanes that have seen nothing."""
    top = tl.full([lanes], FLOOR, tl.float32)
    return top, tl.full([lanes], 0.0, tl.float32), tl.full([lanes, width], 0.0, tl.float32)


@triton.jit
def take_in(top, mass, total, q, keys, values, bias):
    """Lanes after one more tile.

    Args:
        q: `[width]`, scaled.
        keys, values: `[lanes, width]`, finite where hidden.
        bias: added to the scores `[lanes]`, -inf where hidden.
    """
    scores = tl.sum(q[None, :] * keys, 1) + bias
    higher = tl.maximum(top, scores)
    kept, new = tl.exp(top - higher), tl.exp(scores - higher)
    return higher, mass * kept + new, total * kept[:, None] + new[:, None] * values


@triton.jit
def fold(top, mass, total):
    """One softmax of all lanes: its maximum, its mass `[]` and its total `[width]`."""
    highest = tl.max(top, 0)
    share = tl.exp(top - highest)
    return highest, tl.sum(mass * share, 0), tl.sum(total * share[:, None], 0)


@triton.jit
def hide(visible):
    """The bias of slots: 0, or -inf where they are not visible."""
    return tl.where(visible, 0.0, float("-inf"))


@triton.jit
def load_slots(ring_ptr, slots, there, size: constexpr, block: constexpr):
    """Keys or values of a ring's slots, float32 `[lanes, block]`, zero where not `there`."""
    d = tl.arange(0, block)[None, :]
    place = slots[:, None] * size + d
    return tl.load(ring_ptr + place, mask=there[:, None] & (d < size), other=0).to(tl.float32)


@triton.jit
def load_vector(x_ptr, size: constexpr, block: constexpr):
    """One head's vector, float32 `[block]`, zero behind its end."""
    d = tl.arange(0, block)
    return tl.load(x_ptr + d, mask=d < size, other=0).to(tl.float32)


@triton.jit
def store_vector(x_ptr, x, kept, size: constexpr, block: constexpr):
    """Store one head's vector, if it is to be kept."""
    d = tl.arange(0, block)
    tl.store(x_ptr + d, x, mask=(d < size) & kept)
