"""Softmax over tiles, online: each lane of a tile keeps a softmax of its own until the end.

A tile is some slots of a ring, their keys and their values. The usual form (Milakov and
Gimelshein, arXiv 1805.02867) folds every tile into one maximum and one sum, which makes all threads
wait for each other. Here lane i of every tile belongs to one softmax of its own, `(top, mass,
total)` with `mass = sum exp(score - top)` and `total = sum exp(score - top) value`; the lanes are
folded into one when the last tile is through. So are the parts of a window that programs shared.
"""

import triton
import triton.language as tl

# Below any score, but no infinity: the difference of two infinities would be NaN.
FLOOR = tl.constexpr(-3.0e38)


@triton.jit
def no_softmax(LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Lanes that have seen nothing."""
    top = tl.full([LANES], FLOOR, tl.float32)
    return top, tl.full([LANES], 0.0, tl.float32), tl.full([LANES, WIDTH], 0.0, tl.float32)


@triton.jit
def take_in(top, mass, total, q, keys, values, bias):
    """Lanes after one more tile.

    Args:
        q: `[WIDTH]`, scaled.
        keys, values: `[LANES, WIDTH]`, finite where hidden.
        bias: added to the scores `[LANES]`, -inf where hidden.
    """
    scores = tl.sum(q[None, :] * keys, 1) + bias
    higher = tl.maximum(top, scores)
    kept, new = tl.exp(top - higher), tl.exp(scores - higher)
    return higher, mass * kept + new, total * kept[:, None] + new[:, None] * values


@triton.jit
def fold(top, mass, total):
    """One softmax of all lanes: its maximum, its mass `[]` and its total `[WIDTH]`."""
    highest = tl.max(top, 0)
    share = tl.exp(top - highest)
    return highest, tl.sum(mass * share, 0), tl.sum(total * share[:, None], 0)


@triton.jit
def hide(visible):
    """The bias of slots: 0, or -inf where they are not visible."""
    return tl.where(visible, 0.0, float("-inf"))


@triton.jit
def load_slots(ring_ptr, slots, there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Keys or values of a ring's slots, float32 `[LANES, BLOCK_D]`, zero where not `there`."""
    d = tl.arange(0, BLOCK_D)[None, :]
    place = slots[:, None] * D + d
    return tl.load(ring_ptr + place, mask=there[:, None] & (d < D), other=0).to(tl.float32)


@triton.jit
def load_vector(x_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """One head's vector, float32 `[BLOCK_D]`, zero from D on."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(x_ptr + d, mask=d < D, other=0).to(tl.float32)


@triton.jit
def store_vector(x_ptr, x, kept, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store one head's vector, if it is to be kept."""
    d = tl.arange(0, BLOCK_D)
    tl.store(x_ptr + d, x, mask=(d < D) & kept)
