"""Many tokens are turned as Moshi turns them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from moshi.modules.rope import RotaryEmbedding

from ttt_cache.rotation import turned

SIZES = st.integers(1, 9)


@given(SIZES, SIZES, SIZES, SIZES, st.integers(0, 100_000), st.booleans(), st.integers(0, 2**31))
def test_a_rotation_and_its_gradient_are_moshis(rows, heads, length, half, start, interleave, seed):
    torch.manual_seed(seed)
    rope = RotaryEmbedding(interleave=interleave, max_period=5_000.0)
    x, by = torch.randn(2, rows, length, heads, 2 * half).transpose(2, 3).unbind()
    offset = start + torch.arange(rows)
    x.requires_grad_()
    expected, _ = rope(x, x, offset)
    found = turned(rope, x, offset)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    gradients = [torch.autograd.grad(y, x, by)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_come_back_as_they_are(dtype):
    x, offset = torch.randn(2, 3, 5, 8).to(dtype), torch.tensor([0, 7])
    expected, _ = RotaryEmbedding(interleave=True)(x, x, offset)
    found = turned(RotaryEmbedding(interleave=True), x, offset)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_a_rotation_of_ones_own_is_asked_itself():
    x = torch.randn(1, 2, 3, 4)
    assert torch.equal(turned(lambda q, k, offset: (-q, -k), x, torch.zeros(1)), -x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_layout_in_memory_is_turned(dtype):
    rope, offset = RotaryEmbedding(interleave=True), torch.tensor([3])
    columns = torch.randn(1, 2, 8, 5).to(dtype).transpose(2, 3)
    odd = torch.randn(1, 2, 5, 9).to(dtype)[..., 1:]
    shifted = torch.randn(81).to(dtype)[1:].view(1, 2, 5, 8)
    for x in (columns, odd, shifted):
        expected, _ = rope(x, x, offset)
        torch.testing.assert_close(turned(rope, x, offset), expected, rtol=1e-2, atol=1e-6)
