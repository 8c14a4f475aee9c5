"""Tiny Moshi models of the real classes, for the tests that need one."""

from __future__ import annotations

from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.modules.transformer import StreamingMultiheadAttention
from torch import Tensor, nn

import ttt_cache

# The settings of Moshi 7B (moshi.models.loaders._lm_kwargs), small.
TINY: dict[str, Any] = {
    "n_q": 4,
    "dep_q": 2,
    "card": 30,
    "text_card": 40,
    "delays": [0, 0, 1, 0, 1],
    "dim": 32,
    "num_heads": 4,
    "num_layers": 3,
    "hidden_scale": 2,
    "context": 64,
    "causal": True,
    "layer_scale": None,
    "max_period": 10000,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
    "depformer_dim": 16,
    "depformer_num_heads": 2,
    "depformer_num_layers": 1,
    "depformer_multi_linear": True,
    "depformer_weights_per_step": True,
    "depformer_pos_emb": "none",
    "depformer_context": 8,
}

# A cache that evicts within a few tokens.
SMALL: dict[str, Any] = {
    "recent": 6,
    "virtual": 3,
    "chunk": 4,
    "memory_heads": 2,
    "memory_dim": 8,
    "hidden_dim": 12,
}


def tiny_lm(seed: int = 0, **changes: Any) -> LMModel:
    """A seeded LMModel in eval mode; `changes` override `TINY`."""
    torch.manual_seed(seed)
    return LMModel(**{**TINY, **changes}).eval()


def random_codes(model: LMModel, length: int, batch: int = 2, seed: int = 1) -> Tensor:
    """Codes `[batch, 1 + n_q, length]` for `model.forward`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, model.num_codebooks, length)
    return torch.randint(0, model.card, shape, generator=generator)


def stir(model: nn.Module, seed: int = 2) -> None:
    """Random adapter weights, so that the memory matters: values start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in ttt_cache.adapter_parameters(model):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.5 * noise.to(parameter.dtype))


@torch.no_grad()
def temporal(model: LMModel, codes: Tensor) -> Tensor:
    """Text logits of the temporal transformer on undelayed codes, `[B, T, text_card]`."""
    return model.forward_text(codes)[1][:, 0]


@torch.no_grad()
def streamed(model: LMModel, codes: Tensor, lengths: list[int] | None = None) -> Tensor:
    """The same as `temporal`, streamed in calls of the given lengths (default: one by one)."""
    with model.streaming(codes.shape[0]):
        parts = codes.split(lengths or 1, dim=2)
        return torch.cat([model.forward_text(part)[1][:, 0] for part in parts], dim=1)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to within `tolerance` of the scale of `expected`."""
    scale = expected.abs().max().clamp(min=1e-30)
    worst = (actual - expected).abs().max() / scale
    assert worst <= tolerance, f"differs by {worst:.2e} of the scale, allowed {tolerance:.0e}"


def fingerprint(model: nn.Module) -> dict:
    """Everything that removal must restore: classes, tensors, hooks, attributes, caches."""
    return {
        name: (
            type(module),
            sorted(module.__dict__),
            list(module._modules),
            {key: id(p) for key, p in module._parameters.items()},
            dict(module._forward_hooks),
            dict(module._forward_pre_hooks),
            [n for n, _ in getattr(module, "_cached_children", None) or []],
        )
        for name, module in model.named_modules()
    }


def attentions(model: LMModel) -> list[StreamingMultiheadAttention]:
    return [layer.self_attn for layer in model.transformer.layers]
