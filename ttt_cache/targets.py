"""Which layers of which Moshi model can take a cache, and what each of them is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from moshi.modules.lora import LoRALinear
from moshi.modules.streaming import StreamingModule
from moshi.modules.transformer import (
    StreamingMultiheadAttention,
    StreamingTransformer,
    StreamingTransformerLayer,
)
from moshi.utils.quantize import QLinear
from torch import nn

from .config import CacheConfig


def attention_of(transformer: StreamingTransformer, layer: int) -> StreamingMultiheadAttention:
    """The self-attention of a layer."""
    return transformer.layers[layer].self_attn  # type: ignore[union-attr,return-value]


def find_transformer(model: nn.Module) -> StreamingTransformer:
    """The one temporal transformer in `model`.

    Raises:
        TypeError: not a module.
        ValueError: none, or more than one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = dict(_transformers(model, ""))
    if len(found) != 1:
        names = ", ".join(repr(name) for name in found) or "none"
        raise ValueError(
            "model must be an LMModel, a StreamingTransformer or a module that holds exactly one "
            f"temporal transformer; {type(model).__name__} holds {len(found)}: {names}"
        )
    return next(iter(found.values()))


def _transformers(module: nn.Module, path: str) -> Iterable[tuple[str, StreamingTransformer]]:
    if isinstance(module, StreamingTransformer):
        yield path, module
        return
    for name, child in module.named_children():
        # Mimi's transformers are patched only when they are given themselves.
        depth = isinstance(module, LMModel) and name == "depformer"
        if not depth and not isinstance(child, MimiModel):
            yield from _transformers(child, f"{path}.{name}" if path else name)


def resolve(config: CacheConfig, transformer: StreamingTransformer) -> CacheConfig:
    """`config` with every layer index counted from 0, and mappings that fit the layers."""
    num_layers = len(transformer.layers)

    def index(name: str, layer: int) -> int:
        if not -num_layers <= layer < num_layers:
            raise ValueError(
                f"{name} must be between {-num_layers} and {num_layers - 1} for a transformer of "
                f"{num_layers} layers, got {layer}"
            )
        return layer % num_layers

    given = range(num_layers) if config.layers is None else config.layers
    layers = [index("layers", layer) for layer in given]
    repeated = sorted({layer for layer in layers if layers.count(layer) > 1})
    if repeated:
        raise ValueError(f"layers names layer {repeated[0]} more than once, got {config.layers}")
    changes: dict[str, Any] = {"layers": tuple(layers)}
    for name in ("recent", "virtual", "gate"):
        value = getattr(config, name)
        if isinstance(value, Mapping):
            changes[name] = {index(f"{name} keys", k): v for k, v in value.items()}
            if len(changes[name]) < len(value):
                raise ValueError(f"{name} must name each layer once, got {sorted(value)}")
            if (got := sorted(changes[name])) != sorted(layers):
                raise ValueError(f"{name} must map exactly the patched layers {layers}, got {got}")
    return replace(config, **changes)


def settings_of_layer(
    config: CacheConfig, transformer: StreamingTransformer, layer: int
) -> CacheConfig:
    """The settings of one layer, with mappings resolved and the context looked up.

    Raises:
        ValueError: two of them, at least one a mapping, exclude each other; there is no context.
    """
    try:
        own = config.for_layer(layer)
        if own.recent is not None:
            return own
        context = getattr(getattr(transformer.layers[layer], "self_attn", None), "context", None)
        if context is None:
            raise ValueError("recent=None is the layer's context, and it has none")
        return replace(own, recent=context)
    except ValueError as error:
        raise ValueError(f"layer {layer}: {error}") from None


def check_layer(transformer: StreamingTransformer, layer: int, config: CacheConfig) -> None:
    """Raise `ValueError`, naming the layer, if its self-attention cannot take the cache."""
    block = transformer.layers[layer]
    attention = getattr(block, "self_attn", None)
    reason = None
    if not isinstance(block, StreamingTransformerLayer) or attention is None:
        reason = f"it is a {type(block).__name__} without self-attention"
    elif not hasattr(attention, "in_projs"):
        reason = "it comes from an older moshi package (no in_projs); install moshi 0.2.13 or newer"
    elif type(attention) is not StreamingMultiheadAttention:
        reason = f"its self-attention is a {type(attention).__name__}"
    elif attention.weights_per_step:
        reason = f"it has weights_per_step={attention.weights_per_step}"
    elif attention.cross_attention or not attention.causal:
        reason = "its self-attention is not causal"
    elif attention.context is None:
        reason = "it has no context (context=None)"
    if reason is not None:
        raise ValueError(f"layers: layer {layer} cannot be patched: {reason}")
    context = attention_of(transformer, layer).context
    if config.memory != "none" and context is not None and config.window.capacity > context:
        held = "recent" if config.window.arrived else "recent + chunk - 1"
        waits = config.window.capacity > config.window.recent <= context
        raise ValueError(
            f"{held} must be within the context {context} of layer {layer}, "
            f"got recent={config.recent} and chunk={config.chunk}"
            + ("; write='arrived' needs no room for a chunk" if waits else "")
        )


def projection_format(attention: StreamingMultiheadAttention) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of an attention's keys, as stock Moshi chooses them for its ring."""
    projection = attention.in_projs[0]
    if isinstance(projection, QLinear):
        return projection.weight.device, torch.float16
    if isinstance(projection, LoRALinear):
        projection = projection.lora_A
    weight = next(projection.parameters())
    return weight.device, weight.dtype


def refuse_streaming(model: nn.Module, transformer: StreamingTransformer, verb: str) -> None:
    """Raise `RuntimeError` if the transformer, a part of it or a module around it is streaming."""
    inside = set(transformer.modules())
    for name, module in model.named_modules():
        concerned = module in inside or transformer in set(module.modules())
        if concerned and isinstance(module, StreamingModule) and module.is_streaming:
            part = name or type(module).__name__
            raise RuntimeError(
                f"model cannot be {verb} while it is streaming ({part} is); "
                "leave the streaming context first"
            )
