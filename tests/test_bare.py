"""The step of a bare window in 16 bits, beside attention written out in float64."""

from __future__ import annotations

import pytest
import torch
from models import attentions, random_codes, streamed, tiny_lm
from moshi.modules.rope import RotaryEmbedding
from torch import Tensor

import ttt_cache
from ttt_cache import CacheConfig, HierarchicalCache

HEADS, WIDTH, RECENT, ROWS = 4, 8, 5, 3
BITS = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}  # two roundings of scores and weights


def attended(q: Tensor, kept: list[tuple[Tensor, Tensor]], rope: RotaryEmbedding | None) -> Tensor:
    """`q` `[H, D]` over the last tokens of its own conversation, `kept` from its beginning."""
    end, repeat = len(kept) - 1, HEADS // len(kept[0][0])
    out = torch.zeros(HEADS, WIDTH, dtype=torch.float64)
    for head in range(HEADS):
        scores, values = [], []
        for position in range(max(0, len(kept) - RECENT), len(kept)):
            key, value = (part[head // repeat].float() for part in kept[position])
            query = q[head].float()
            if rope is not None:  # at their own positions
                query, _ = rope(query.view(1, 1, 1, -1), key.view(1, 1, 1, -1), torch.tensor([end]))
                _, key = rope(query, key.view(1, 1, 1, -1), torch.tensor([position]))
            scores.append((query.double().flatten() @ key.double().flatten()) / WIDTH**0.5)
            values.append(value.double())
        out[head] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out


@torch.no_grad()
@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("rope", [RotaryEmbedding(True), None])
def test_rows_step_when_they_are_told_to(
    dtype: torch.dtype, kv_heads: int, rope: RotaryEmbedding | None
) -> None:
    cache = HierarchicalCache(
        CacheConfig(recent=RECENT, memory="none"), dim=HEADS * WIDTH, num_heads=HEADS,
        head_dim=WIDTH, kv_heads=kv_heads, rope=rope, dtype=dtype,
    )  # fmt: skip
    state, generator = cache.init_state(ROWS), torch.Generator().manual_seed(0)
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(ROWS)]
    for token in range(40):
        if token == 20:
            state.reset(torch.tensor([False, True, False]))
            kept[1] = []
        mask = torch.rand(ROWS, generator=generator) < 0.7
        sizes = [HEADS, kv_heads, kv_heads]
        q, k, v = (torch.randn(ROWS, h, 1, WIDTH, generator=generator).to(dtype) for h in sizes)
        before = {name: t.clone() for name, t in state.tensors()}
        y = cache.stream(q, k, v, torch.zeros(ROWS, 1, HEADS * WIDTH, dtype=dtype), state, mask)
        for name, tensor in state.tensors():
            assert torch.equal(tensor[~mask], before[name][~mask]), "rows outside keep their bits"
        for row in mask.nonzero().flatten().tolist():
            kept[row].append((k[row, :, 0], v[row, :, 0]))
            expected = attended(q[row, :, 0], kept[row], rope)
            assert y.dtype == dtype
            assert (y[row, :, 0] - expected).abs().max() <= BITS[dtype] * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("kv_repeat", [1, 2])
def test_it_is_moshis_attention_to_the_bit(dtype: torch.dtype, kv_repeat: int) -> None:
    model = tiny_lm(context=12, kv_repeat=kv_repeat).to(dtype)
    codes = random_codes(model, 40)
    stock = streamed(model, codes)
    with ttt_cache.patch(model, memory="none", recent=None):
        assert type(attentions(model)[0]).__name__ == "PatchedAttention"
        assert torch.equal(streamed(model, codes), stock)
