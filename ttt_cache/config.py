"""Every setting of the cache, checked once."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeVar

from .checks import (
    layer_indices,
    one_of,
    per_layer,
    real_number,
    true_or_false,
    whole_number,
)
from .exclusions import refuse_exclusions
from .presets import settings_of
from .recent import Window

GATES = ("joint", "fixed", "layer", "head", "query", "residual")
CHOICES = {
    "memory": ("ttt-mlp", "ttt-linear", "mean", "cluster", "random", "none"),
    "source": ("hidden", "kv", "output"),
    "read": ("virtual", "query"),
    "write": ("evicted", "arrived"),
    "position": ("none", "slot", "decay"),
}

C = TypeVar("C")
T = TypeVar("T")
PerLayer = T | Mapping[int, T]


def _with_presets(cls: type[C]) -> type[C]:
    """Let what a preset names be the default of what is not given."""
    generated = cls.__init__

    @functools.wraps(generated)
    def init(self: C, **given: Any) -> None:
        if given.get("gate", "") is None:
            del given["gate"]
        generated(self, **(settings_of(given.get("preset")) | given))

    cls.__init__ = init  # type: ignore[method-assign]
    return cls


@_with_presets
@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Settings of a hierarchical cache (symbols of `docs/semantics.md` in brackets).

    `recent`, `virtual` and `gate` may be mappings from layer index to value. A mapping names
    exactly the patched layers.

    Args:
        layers: layers to patch, negative indices allowed; `None` means all.
        recent: frames that are kept exactly [N]; 0 replaces attention by the memory. `None` means
            the whole context of whichever layer is patched.
        virtual: virtual tokens read out of the memory [M], at least 1. `mean` always has one.
        chunk: frames that make one memory version together [C]; with `write="evicted"` they
            leave the window together.
        sinks: first frames that are kept for ever [S] (StreamingLLM, arXiv 2309.17453).
        memory: what takes in the frames: `ttt-mlp`, `ttt-linear`, `mean`, `cluster`, `random` or
            `none`.
        memory_heads: heads of the memory (not of the attention).
        memory_dim: width of one memory head.
        hidden_dim: hidden width of one memory head's MLP.
        depth: layers of that MLP, 2 or 3.
        source: what the memory learns of a frame: `hidden` (the layer's input), `kv` (keys before
            RoPE and values) or `output` (the window's attention output).
        read: `virtual` (attend to virtual tokens) or `query` (put the frame's own query through
            the memory: a TTT layer, arXiv 2407.04620).
        write: the memory takes in a frame when it is `evicted` from the window, or at once when it
            has `arrived`.
        gate: how window and memory are mixed, see `ttt_cache.attention.Gate`. If not given, or
            `None`: the preset's, else `joint`, else for `read="query"` `head`.
        alpha: share of the recent window under `gate="fixed"`, in [0, 1].
        position: of virtual tokens: `none`, `slot` (a learned bias each, oldest to newest) or
            `decay` (a bias that falls with age, at a learned rate).
        share: one set of slow weights for all patched layers; the state stays per layer.
        reset_memory: a control: put the memory back to version 0 before every read.
        bptt: chunks that gradients travel back through the memory in training; `None` means all.
            It shortens the path, for stability; memory in training is the same.
        preset: a name in `ttt_cache.presets.PRESETS`; its settings are the defaults of what is not
            given. (`dataclasses.replace` gives everything: a preset changes nothing there.)

    Raises:
        TypeError, ValueError: a value is of the wrong type or out of range, or two settings exclude
            each other; the message names them.
    """

    layers: tuple[int, ...] | None = None
    recent: PerLayer[int] | None = 100
    virtual: PerLayer[int] = 10
    chunk: int = 8
    sinks: int = 0
    memory: str = "ttt-mlp"
    memory_heads: int = 4
    memory_dim: int = 64
    hidden_dim: int = 128
    depth: int = 2
    source: str = "hidden"
    read: str = "virtual"
    write: str = "evicted"
    gate: PerLayer[str] | None = None
    alpha: float = 0.9
    position: str = "none"
    share: bool = False
    reset_memory: bool = False
    bptt: int | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name, allowed in CHOICES.items():
            one_of(name, getattr(self, name), allowed)
        put("layers", layer_indices(self.layers))
        if self.recent is not None:
            put("recent", per_layer("recent", self.recent, lambda n, v: whole_number(n, v, 0)))
        put("virtual", per_layer("virtual", self.virtual, lambda n, v: whole_number(n, v, 1)))
        if self.gate is None:
            put("gate", "head" if self.read == "query" else "joint")
        put("gate", per_layer("gate", self.gate, lambda n, v: one_of(n, v, GATES)))
        for name in ("chunk", "memory_heads", "memory_dim", "hidden_dim"):
            put(name, whole_number(name, getattr(self, name), 1))
        put("sinks", whole_number("sinks", self.sinks, 0))
        put("depth", _depth(self.depth))
        put("alpha", real_number("alpha", self.alpha, 0, 1))
        for name in ("share", "reset_memory"):
            true_or_false(name, getattr(self, name))
        if self.bptt is not None:
            put("bptt", whole_number("bptt", self.bptt, 1))
        refuse_exclusions(self)

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
        if self.recent is None:
            raise ValueError("recent must be a number here; only patch knows a layer's context")
        recent = whole_number("recent", self.recent, 0)
        chunk = 1 if self.memory == "none" else self.chunk
        return Window(recent, chunk, self.sinks, self.write == "arrived")


def _depth(value: Any) -> int:
    depth = whole_number("depth", value)
    if depth not in (2, 3):
        raise ValueError(f"depth must be 2 or 3, got {depth}")
    return depth
