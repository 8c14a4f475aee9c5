"""The testbed's Moshi: its shape."""

from __future__ import annotations

from typing import Any

from moshi.models.loaders import _lm_kwargs

from . import vocabulary as v

CONTEXT = 1024  # frames, and the longest sequence in training

# What Moshi's own config.json holds for Moshi 7B, made small.
CONFIG: dict[str, Any] = _lm_kwargs | {
    "dim": 256,
    "num_heads": 4,
    "num_layers": 2,
    "hidden_scale": 2,
    "text_card": v.TEXT_CARD,
    "card": v.CARD,
    "n_q": 4,
    "dep_q": 2,
    "delays": v.DELAYS,
    "context": CONTEXT,
    "depformer_dim": 64,
    "depformer_dim_feedforward": 128,
    "depformer_num_heads": 2,
    "depformer_num_layers": 1,
}
