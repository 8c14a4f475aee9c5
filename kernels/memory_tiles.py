"""What the parts of the memory kernel share: sizes known when it is compiled, and tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl

from .constant import constexpr

EPS = tl.constexpr(1e-6)
LARGEST = tl.constexpr(1e15)  # of a projected feature
SLOPE = tl.constexpr(2 * math.sqrt(2 / math.pi))  # gelu(z) = z sigmoid(SLOPE (z + CUBIC z^3))
CUBIC = tl.constexpr(0.044715)


@dataclass(frozen=True)
class Sizes:
    """Everything about a memory that its kernel is compiled for.

    Fields only: a property's code would be no part of the key under which Triton keeps kernels.

    Attributes:
        heads, d: memory heads and their width.
        n: rows of F: hidden units, or d for a linear memory.
        slots: read-outs of a version, M.
        wait: tokens that wait for the memory, N.
        chunk: tokens that make a version, C.
        linear: there is no W1.
        width: features of a token, F.
        cap: the largest norm of F at a chunk's end.
        block_d, block_n: the powers of two that hold d and n.
        tile: elements of a matrix that a program works on at a time.
    """

    heads: int
    d: int
    n: int
    slots: int
    wait: int
    chunk: int
    linear: bool
    width: int
    cap: float
    block_d: int
    block_n: int
    tile: int


@triton.jit
def load_tile(matrix, rows, columns, height: constexpr, width: constexpr, wanted=True):
    """Some rows and columns of a matrix; zeros beyond its edges, and if it is not wanted."""
    inside = (rows[:, None] < height) & (columns[None, :] < width) & wanted
    return tl.load(matrix + rows[:, None] * width + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(matrix, tile, rows, columns, height: constexpr, width: constexpr, wanted=True):
    """Put such a tile back, but for what is beyond the edges."""
    inside = (rows[:, None] < height) & (columns[None, :] < width) & wanted
    tl.store(matrix + rows[:, None] * width + columns[None, :], tile, mask=inside)


@triton.jit
def entries(vector, index, size: constexpr):
    """Some entries of a projected vector, wide and finite; zeros behind its end."""
    return finite(tl.load(vector + index, mask=index < size, other=0.0).to(tl.float32))


@triton.jit
def finite(x):
    """Overflow of a narrow projection taken as large; not `clamp`, which may lose a NaN."""
    return tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x))


@triton.jit
def gelu_share(z):
    """`gelu(z) / z` of GELU's tanh form."""
    return tl.sigmoid(SLOPE * (z + CUBIC * z * z * z))
