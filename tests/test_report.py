"""The report's bytes are the bytes of the tensors that streaming allocates."""

from __future__ import annotations

import pytest
import torch
from models import SMALL, tiny_lm
from moshi.models.loaders import get_moshi_lm
from moshi.modules.transformer import StreamingTransformer
from torch import nn

import ttt_cache
from ttt_cache.report import state_bytes


def allocated(model, batch_size):
    """Bytes per layer of the self-attention's real streaming state."""
    with model.streaming(batch_size):
        states = [layer.self_attn._streaming_state for layer in model.transformer.layers]
        return [state_bytes(state) for state in states]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"memory": "mean", "sinks": 2}, {"memory": "none"}])
def test_reported_bytes_are_allocated_bytes(settings, batch_size, capsys):
    model = tiny_lm()
    stock = allocated(model, batch_size)
    ttt_cache.patch(model, layers=[0, 2], **(SMALL | settings))
    report = ttt_cache.report(model, batch_size=batch_size)
    assert [row.stock_bytes for row in report.layers] == stock
    assert [row.patched_bytes for row in report.layers] == allocated(model, batch_size)
    assert [row.patched for row in report.layers] == [True, False, True]
    assert report.stock_bytes == sum(stock)
    printed = capsys.readouterr().out
    assert "total" in printed and "1 (stock)" in printed
    assert f"{report.patched_bytes / 1e6:,.2f}" in str(report)


def test_stock_ring_counts_keys_and_values():
    """An independent figure: 2 x heads x context x width x 4 bytes, and bookkeeping below 1 KB."""
    report = ttt_cache.report(tiny_lm())
    ring = 2 * 4 * 64 * 8 * 4
    assert all(ring <= row.stock_bytes < ring + 1000 for row in report.layers)
    assert report.patched_bytes == report.stock_bytes


def test_moshi_7b_on_the_meta_device():
    """What a user saves, before 15 GB are loaded: at most 75 MB instead of 1,573."""
    model = get_moshi_lm(None, device="meta", dtype=torch.bfloat16)
    ttt_cache.patch(model)
    report = ttt_cache.report(model)
    assert len(report.layers) == 32
    assert report.stock_bytes / 1e6 == pytest.approx(1573, abs=1)
    assert report.patched_bytes <= 75e6
    assert all(p.is_meta for p in model.parameters())


def test_bad_input():
    model = tiny_lm()
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        ttt_cache.report(model, batch_size=0)
    with pytest.raises(TypeError, match="batch_size"):
        ttt_cache.report(model, batch_size=1.5)
    with pytest.raises(ValueError, match="layer 0 has no context"):
        ttt_cache.report(tiny_lm(context=None))
    with pytest.raises(ValueError, match="layer 0 has no self-attention"):
        ttt_cache.report(StreamingTransformer(8, 2, 1, 16, context=9, skip_self_attn=True))
    with pytest.raises(ValueError, match="holds 0"):
        ttt_cache.report(nn.Linear(2, 2))
