"""Into Moshi's layers and out again: see `patched.py` for what stands there in between."""

from __future__ import annotations

from typing import Any

from moshi.modules.streaming import StreamingModule
from moshi.modules.transformer import StreamingMultiheadAttention, StreamingTransformer
from torch import nn

from .cache import HierarchicalCache
from .config import CacheConfig
from .patched import SLOT, PatchedAttention
from .targets import (
    attention_of,
    check_layer,
    find_transformer,
    projection_format,
    refuse_streaming,
    resolve,
    settings_of_layer,
)


class Patch:
    """A patch that is in place; also a context manager that removes it at the end.

    Attributes:
        transformer: the patched `StreamingTransformer`.
        config: the settings, with `layers` resolved to indices from 0.
    """

    def __init__(
        self, model: nn.Module, config: CacheConfig, caches: dict[int, HierarchicalCache]
    ) -> None:
        self.transformer = find_transformer(model)
        self.config = config
        self.caches = caches
        streaming = (m for m in model.modules() if isinstance(m, StreamingModule))
        # Streaming fills `_cached_children`; removal leaves them as they were found.
        self._never_streamed = [m for m in streaming if m._cached_children is None]

    @property
    def layers(self) -> tuple[int, ...]:
        """The patched layers, from 0."""
        return tuple(self.caches)

    def install(self) -> Patch:
        for layer, cache in self.caches.items():
            attention = attention_of(self.transformer, layer)
            attention.__class__ = PatchedAttention
            attention.add_module(SLOT, cache)
        setattr(self.transformer, SLOT, self)
        return self

    def remove(self) -> None:
        """Put Moshi's own attention back; does nothing if that has happened already.

        Raises:
            RuntimeError: the model is streaming.
        """
        if patch_of(self.transformer) is not self:
            return
        refuse_streaming(self.transformer, self.transformer, "unpatched")
        for layer in self.caches:
            attention = attention_of(self.transformer, layer)
            attention.__class__ = StreamingMultiheadAttention
            delattr(attention, SLOT)
        delattr(self.transformer, SLOT)
        for module in self._never_streamed:
            module._cached_children = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the transformer alone must not bring the rest of the model along.
        inside = set(self.transformer.modules())
        return vars(self) | {"_never_streamed": [m for m in self._never_streamed if m in inside]}

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            self.remove()
        except RuntimeError:
            if kind is None:  # else the body's own error says more
                raise

    def __repr__(self) -> str:
        return f"Patch(layers={list(self.layers)}, config={self.config})"


def patch(model: nn.Module, *, config: CacheConfig | None = None, **settings: Any) -> Patch:
    """Put a hierarchical cache into the layers of a Moshi model.

    Args:
        model: an `LMModel`, a `StreamingTransformer`, or a module that holds exactly one temporal
            transformer. The depformer is never touched.
        config: the settings, or give them as keywords: the fields of `CacheConfig`.

    Returns:
        The handle: `handle.remove()`, or use it in a `with` statement.

    Raises:
        TypeError: the model is not a module, or a setting is unknown or of the wrong type.
        ValueError: a setting is out of range, a layer does not exist or cannot be patched.
        RuntimeError: the model is patched already, or is streaming.
        Nothing is changed when something is refused.

    New weights are drawn from torch's global generator: seed it before, or again after.

    Example:
        >>> handle = ttt_cache.patch(model, layers=range(25, 32), recent=100)
    """
    if config is not None and settings:
        raise TypeError(f"give config or settings, not both; got config and {sorted(settings)}")
    if config is not None and not isinstance(config, CacheConfig):
        raise TypeError(f"config must be a CacheConfig, got {config!r}")
    return prepare(model, config or CacheConfig.from_fields(settings)).install()


def prepare(model: nn.Module, config: CacheConfig) -> Patch:
    """Check everything and build the caches; the model is not touched until `install`."""
    transformer = find_transformer(model)
    if patch_of(transformer) is not None:
        raise RuntimeError(
            "model is patched already; call ttt_cache.unpatch(model) first. For other settings in "
            "other layers give recent, virtual or gate as a mapping from layer index to value"
        )
    refuse_streaming(model, transformer, "patched")
    config = resolve(config, transformer)
    assert config.layers is not None
    settings = {layer: settings_of_layer(config, transformer, layer) for layer in config.layers}
    for layer, own in settings.items():
        check_layer(transformer, layer, own)
    caches = {layer: build_cache(transformer, layer, own) for layer, own in settings.items()}
    if config.share:
        first, *others = caches.values()
        for cache in others:
            cache.memory, cache.reader = first.memory, first.reader
    return Patch(model, config, caches)


def unpatch(model: nn.Module) -> None:
    """Undo `patch` without its handle.

    Raises:
        RuntimeError: the model is not patched, or is streaming.
    """
    require_patch(model).remove()


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable tensors of the patch, for an optimizer. The base model is left alone.

    The list is empty where there is nothing to train: presets `window`, `streaming-llm`,
    `full-context` and `extended-context`.

    Raises:
        RuntimeError: the model is not patched.
    """
    return list(nn.ModuleList(require_patch(model).caches.values()).parameters())  # shared: once


def require_patch(model: nn.Module) -> Patch:
    """The patch of a model; raises `RuntimeError` if there is none."""
    handle = patch_of(find_transformer(model))
    if handle is None:
        raise RuntimeError("model is not patched; call ttt_cache.patch(model) first")
    return handle


def patch_of(transformer: StreamingTransformer) -> Patch | None:
    """The patch that is installed in a transformer, if any."""
    return transformer.__dict__.get(SLOT)


def build_cache(
    transformer: StreamingTransformer, layer: int, config: CacheConfig
) -> HierarchicalCache:
    """A new cache that fits a layer's attention; `config`: settings of one layer."""
    attention = attention_of(transformer, layer)
    device, dtype = projection_format(attention)
    return HierarchicalCache(
        config,
        dim=attention.embed_dim,
        num_heads=attention.num_heads,
        head_dim=attention.embed_dim // attention.num_heads,
        kv_heads=attention.num_heads // attention.kv_repeat,
        rope=attention.rope,
        device=device,
        dtype=dtype,
    ).train(attention.training)
