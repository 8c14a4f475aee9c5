"""The two models of the demo: the same weights, one with the cache."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import _lm_kwargs

from ttt_cache.config import CacheConfig
from ttt_cache.patch import Patch, patch


@dataclass(frozen=True)
class Size:
    """What of Moshi 7B is made smaller; all else, as delays, context and norms, is Moshi's own."""

    dim: int = 640
    num_layers: int = 2
    num_heads: int = 5  # of 128, as in Moshi 7B
    text_card: int = 2000
    depformer_dim: int = 64
    depformer_num_heads: int = 1
    depformer_num_layers: int = 1
    depformer_dim_feedforward: int = 264
    context: int = 3000  # frames


def build(size: Size, seed: int, device: str) -> LMModel:
    """A Moshi of the given size with random float32 weights, ready to generate."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = dict(_lm_kwargs) | asdict(size)
    return LMModel(device=device, dtype=torch.float32, **settings).eval()


def make_pair(
    size: Size, config: CacheConfig, seed: int, device: str
) -> tuple[LMModel, LMModel, Patch]:
    """A stock model, a patched model that shares its weights, and the handle of the patch.

    Raises:
        TypeError, ValueError: the settings cannot be used with this model; see `ttt_cache.patch`.
    """
    stock = build(size, seed, device)
    patched = copy.deepcopy(stock, {id(weight): weight for weight in stock.parameters()})
    return stock, patched, patch(patched, config=config)
