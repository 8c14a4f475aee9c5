"""What the kernels of the memory scan share: sizes, products, grams, and a chunk's triangle."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .constant import constexpr
from .memory_tiles import load_tile


@dataclass(frozen=True)
class ScanSizes:
    """Everything about a scan that its kernels are compiled for.

    Fields only: a property's code would be no part of the key under which Triton keeps kernels.

    Attributes:
        d, n: width of a memory head; rows of F: hidden units, or d for a linear memory.
        tokens: of a chunk on the grid, L.
        chunk: tokens that make a version, C.
        linear: there is no W1.
        cap: the largest norm of F at a chunk's end.
        block_l, block_d, block_n: the powers of two that hold tokens, d and n, from 16 on, which
            is the least that `tl.dot` takes; block_n from 32 on.
        units, depth: rows of F (columns of W1), and their columns, that are worked on at a time.
        levels: doublings from one token to all of a chunk.
    """

    d: int
    n: int
    tokens: int
    chunk: int
    linear: bool
    cap: float
    block_l: int
    block_d: int
    block_n: int
    units: int
    depth: int
    levels: int


@triton.jit
def product(a, b, plus=None):
    """`a b`, or `a b` added to a sum, to float32's precision on tensor cores."""
    return tl.dot(a, b, plus, input_precision="tf32x3")


@triton.jit
def zero_vector(size: constexpr):
    return tl.zeros([size], tl.float32)


@triton.jit
def zero_matrix(height: constexpr, width: constexpr):
    return tl.zeros([height, width], tl.float32)


@triton.jit
def by_width(matrix, s: constexpr):
    """Keys, values or errors of a chunk, `[block_l, block_d]`; zeros beyond the edges."""
    return load_tile(matrix, tl.arange(0, s.block_l), tl.arange(0, s.block_d), s.tokens, s.d)


@triton.jit
def by_token(vector, s: constexpr):
    """One number for each token of a chunk, `[block_l]`; zeros behind the last."""
    token = tl.arange(0, s.block_l)
    return tl.load(vector + token, mask=token < s.tokens, other=0.0)


@triton.jit
def by_unit(vector, units, s: constexpr):
    """One number for each of some hidden units; zeros behind the last."""
    return tl.load(vector + units, mask=units < s.n, other=0.0)


@triton.jit
def by_pair(matrix, s: constexpr):
    """One number for each pair of tokens, `[block_l, block_l]`."""
    token = tl.arange(0, s.block_l)
    return load_tile(matrix, token, token, s.tokens, s.tokens)


@triton.jit
def times_columns(x, matrix, units, s: constexpr):
    """`x [L, d]` times some columns of a `[d, n]` matrix, `[block_l, units]`."""
    token = tl.arange(0, s.block_l)
    found = zero_matrix(s.block_l, s.units)
    for j in range(0, s.block_d, s.depth):
        width = j + tl.arange(0, s.depth)
        some = load_tile(x, token, width, s.tokens, s.d)
        found = product(some, load_tile(matrix, width, units, s.d, s.n), found)
    return found


@triton.jit
def times_rows(x, matrix, units, s: constexpr):
    """`x [L, d]` times some rows of an `[n, d]` matrix, `[block_l, units]`."""
    token = tl.arange(0, s.block_l)
    found = zero_matrix(s.block_l, s.units)
    for j in range(0, s.block_d, s.depth):
        width = j + tl.arange(0, s.depth)
        some = load_tile(x, token, width, s.tokens, s.d)
        found = product(some, tl.trans(load_tile(matrix, units, width, s.n, s.d)), found)
    return found


@triton.jit
def overlaps(x, y, width: constexpr, block: constexpr, s: constexpr):
    """Of each token's row of x with each token's row of y, `[block_l, block_l]`."""
    token = tl.arange(0, s.block_l)
    found = zero_matrix(s.block_l, s.block_l)
    for j in range(0, block, s.depth):
        index = j + tl.arange(0, s.depth)
        some = load_tile(x, token, index, s.tokens, width)
        found = product(some, tl.trans(load_tile(y, token, index, s.tokens, width)), found)
    return found


@triton.jit
def lower(pairs, s: constexpr):
    """What is strictly below the diagonal: a token with those before it."""
    token = tl.arange(0, s.block_l)
    return tl.where(token[:, None] > token[None, :], pairs, 0.0)


@triton.jit
def inverse(coupling, s: constexpr):
    """`(I + coupling)^-1` of a strictly lower triangle, by doubling the blocks on its diagonal.

    With the inverses X of neighbouring blocks and what couples them, M, the inverse of both is
    `X - X M X`. Each X is an inverse that the delta rule bounds. Squaring the nilpotent triangle
    would take as many products, but its powers grow like binomials and cancel.
    """
    row, column = tl.arange(0, s.block_l)[:, None], tl.arange(0, s.block_l)[None, :]
    found = tl.where(row == column, 1.0, 0.0)
    levels: constexpr = s.levels
    for level in tl.static_range(levels):  # pyright: ignore[reportGeneralTypeIssues]
        same = (row >> (level + 1)) == (column >> (level + 1))
        between = tl.where(same & ((row >> level) != (column >> level)), coupling, 0.0)
        if level == 0:
            found -= between
        else:
            found -= product(product(found, between), found)
    return found
