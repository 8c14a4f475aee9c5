"""Settings that exclude each other, and why (`docs/semantics.md`, "What excludes what")."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import CacheConfig

NETWORKS = ("ttt-mlp", "ttt-linear")  # memories that a query can be put through


def refuse_exclusions(config: CacheConfig) -> None:
    """Raise `ValueError`, naming two settings and the reason, if any pair excludes each other.

    Settings that are mappings from layer to value are looked at layer by layer, in `for_layer`.
    """
    for one, other, why in (*_without_window(config), *_of_memory(config)):
        first, second = (f"{name}={getattr(config, name)!r}" for name in (one, other))
        raise ValueError(f"{first} and {second} exclude each other: {why}")


def _without_window(config: CacheConfig) -> Iterator[tuple[str, str, str]]:
    """What `recent=0` excludes."""
    if config.recent != 0:
        return
    excluded: dict[str, tuple[Any, str]] = {
        "memory": ("none", "without a window and without a memory nothing is left to attend to"),
        "read": ("virtual", "without a window a token must ask the memory itself, read='query'"),
        "write": ("evicted", "nothing is evicted from an empty window; use write='arrived'"),
        "source": ("output", "there is no window whose output could be taken in"),
        "reset_memory": (True, "without a window there is nothing to fall back on"),
    }
    for name, (value, why) in excluded.items():
        if getattr(config, name) == value:
            yield "recent", name, why
    if config.sinks:
        yield "recent", "sinks", "sinks share the softmax of the window, and there is none"
    if isinstance(config.gate, str) and config.gate != "head":
        yield "recent", "gate", "there is no window to be gated; leave gate out"


def _of_memory(config: CacheConfig) -> Iterator[tuple[str, str, str]]:
    """What the memory and the way of reading it exclude."""
    if config.memory == "none":
        return
    slots = config.virtual.values() if isinstance(config.virtual, Mapping) else [config.virtual]
    has_slots = config.read == "virtual" and config.memory != "mean"
    if config.share and has_slots and len(set(slots)) > 1:
        yield "share", "virtual", "the shared memory has one number of slots"
    delayed = config.read == "virtual" and config.write == "arrived"
    if delayed and isinstance(config.recent, int) and config.chunk > config.recent + 1:
        why = "with write='arrived' frames would be in neither the window nor a memory version"
        yield "recent", "chunk", f"{why}; recent must be at least chunk - 1"
    if config.read == "query":
        if config.memory not in NETWORKS:
            yield "read", "memory", f"only {' and '.join(NETWORKS)} can be asked with a query"
        if config.gate == "joint":
            yield "read", "gate", "one softmax needs virtual tokens; use head or another gate"
        if config.position != "none":
            yield "read", "position", "there are no virtual tokens that could have a position"
    if config.memory in ("mean", "cluster"):
        if config.source == "output":
            yield "memory", "source", "it is made of keys and values"
        if config.position != "none":
            yield "memory", "position", "its virtual tokens have no order from oldest to newest"
    if config.memory == "ttt-linear" and config.depth != 2:
        yield "memory", "depth", "a linear memory has one layer; depth is for ttt-mlp"
    if config.position == "decay" and config.virtual == 1:
        yield "position", "virtual", "one virtual token has no order from oldest to newest"
