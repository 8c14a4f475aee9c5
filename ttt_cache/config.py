"""Every setting of the cache, checked once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from typing import Any, TypeVar

from .checks import one_of, whole_number
from .recent import Window

MEMORIES = ("ttt-mlp", "mean", "random", "none")
GATES = ("joint", "fixed", "layer", "head", "query", "residual")

T = TypeVar("T")
PerLayer = T | Mapping[int, T]


@dataclass(frozen=True)
class CacheConfig:
    """Settings of a hierarchical cache (symbols of `docs/semantics.md` in brackets).

    `recent`, `virtual` and `gate` may be mappings from layer index to value. A mapping names
    exactly the patched layers.

    Args:
        layers: layers to patch, negative indices allowed; `None` means all.
        recent: frames that are kept exactly [N], at least 1.
        virtual: virtual tokens read out of the memory [M], at least 1. `mean` always has one.
        chunk: frames that leave the window together and make one memory version [C].
        sinks: first frames that are kept for ever [S] (StreamingLLM, arXiv 2309.17453).
        memory: what takes in the evicted frames: `ttt-mlp`, `mean`, `random` or `none`.
        memory_heads: heads of the memory (not of the attention).
        memory_dim: width of one memory head.
        hidden_dim: hidden width of one memory head's MLP.
        gate: how the two attentions are mixed, see `ttt_cache.attention.Gate`.
        alpha: share of the recent window under `gate="fixed"`, in [0, 1].
        bptt: chunks that gradients travel back through the memory in training; `None` means all.
            It shortens the path, for stability; memory in training is the same.

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of range; the message names it.
    """

    layers: tuple[int, ...] | None = None
    recent: PerLayer[int] = 100
    virtual: PerLayer[int] = 10
    chunk: int = 8
    sinks: int = 0
    memory: str = "ttt-mlp"
    memory_heads: int = 4
    memory_dim: int = 64
    hidden_dim: int = 128
    gate: PerLayer[str] = "joint"
    alpha: float = 0.9
    bptt: int | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("layers", _layers(self.layers))
        put("recent", _per_layer("recent", self.recent, lambda n, v: whole_number(n, v, 1)))
        put("virtual", _per_layer("virtual", self.virtual, lambda n, v: whole_number(n, v, 1)))
        put("gate", _per_layer("gate", self.gate, lambda n, v: one_of(n, v, GATES)))
        for name in ("chunk", "memory_heads", "memory_dim", "hidden_dim"):
            put(name, whole_number(name, getattr(self, name), 1))
        put("sinks", whole_number("sinks", self.sinks, 0))
        one_of("memory", self.memory, MEMORIES)
        put("alpha", _share("alpha", self.alpha))
        if self.bptt is not None:
            put("bptt", whole_number("bptt", self.bptt, 1))

    @classmethod
    def from_fields(cls, given: Mapping[str, Any]) -> CacheConfig:
        """Build a config from keywords or from JSON, where mapping keys are strings."""
        known = [f.name for f in fields(cls)]
        unknown = [name for name in given if name not in known]
        if unknown:
            raise TypeError(f"unknown setting {unknown[0]!r}; the settings are {', '.join(known)}")
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        """The settings as plain JSON values; `from_fields` reads them back."""
        return asdict(self)

    def for_layer(self, layer: int) -> CacheConfig:
        """The settings of one layer, with every per-layer mapping resolved."""
        chosen = {
            name: value[layer]
            for name in ("recent", "virtual", "gate")
            if isinstance(value := getattr(self, name), Mapping)
        }
        return replace(self, layers=None, **chosen)

    @property
    def window(self) -> Window:
        """What one layer keeps exactly. Without a memory that is exactly the last N frames."""
        recent = whole_number("recent", self.recent, 1)
        return Window(recent, 1 if self.memory == "none" else self.chunk, self.sinks)


def _layers(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"layers must be an iterable of layer indices or None (all), got {value!r}")
    layers = tuple(whole_number("layers", layer) for layer in value)
    if not layers:
        raise ValueError("layers must name at least one layer, got none; None means all")
    repeated = sorted({layer for layer in layers if layers.count(layer) > 1})
    if repeated:
        raise ValueError(f"layers must name each layer once, got {repeated[0]} more than once")
    return layers


def _per_layer(name: str, value: Any, check: Any) -> Any:
    if not isinstance(value, Mapping):
        return check(name, value)
    if not value:
        raise ValueError(f"{name} must be a value or map each patched layer to one, got {{}}")
    checked = {}
    for key, item in value.items():
        is_json = isinstance(key, str) and key.lstrip("-").isdigit()  # JSON keys are strings
        layer = whole_number(f"{name} keys", int(key) if is_json else key)
        if layer in checked:
            raise ValueError(f"{name} must name each layer once, got {layer} more than once")
        checked[layer] = check(f"{name}[{layer}]", item)
    return checked


def _share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number in [0, 1], got {value!r}")
    share = float(value)
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return share
