"""What is compared: the memory and its controls, each a patch on the same frozen model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ttt_cache.adapter import load_adapter
from ttt_cache.config import CacheConfig
from ttt_cache.patch import Patch, prepare
from ttt_cache.targets import find_transformer

from .recipe import HYBRID, Recipe

EXTENDED = 8000 / 3000  # of the context: the plan's extended context on Moshi 7B
SINKS = 4  # as in StreamingLLM, arXiv 2309.17453
HYBRID_LAYER = 30 / 31  # of the way up: layer 30 of Moshi 7B
UNTRAINED_SEED = 0  # of the weights that an arm without an adapter is drawn with


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        name: as in tables and files.
        about: one sentence, shown below the tables.
        settings: keywords of `ttt_cache.patch`.
        trained: it is measured with an adapter that was trained; else as it is drawn.
        recipe: how that is trained, where it cannot be as others are.
        lean: settings with as many frames in less state, if there are: what it costs is theirs.
    """

    name: str
    about: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    trained: bool = False
    recipe: Recipe | None = None
    lean: Mapping[str, Any] | None = None

    @property
    def costed(self) -> Arm:
        """The arm that is measured for what this one costs."""
        return self if self.lean is None else replace(self, settings=self.lean, lean=None)

    @property
    def lesson(self) -> dict[str, Any]:
        """The settings with which its adapter is trained: a memory that is reset learned nothing
        of its own, it takes the weights of the one that is not."""
        return {name: value for name, value in self.settings.items() if name != "reset_memory"}

    @contextmanager
    def on(self, lm: nn.Module, adapter: Path | None = None) -> Iterator[Patch]:
        """Within it `lm` is this arm; then it is stock Moshi again.

        Args:
            adapter: folder of the trained weights; required where `trained`, else unwanted.

        Raises:
            ValueError: there is no adapter, or one of other settings; or as `ttt_cache.patch`.
            RuntimeError: `lm` is patched already, or streaming.
        """
        if self.trained != (adapter is not None):
            wanted = "an adapter" if self.trained else "no adapter"
            raise ValueError(f"adapter: {self.name} takes {wanted}, got {adapter}")
        given = _drawn(lm, self.settings) if adapter is None else self._loaded(lm, adapter)
        with given.install() as handle:
            yield handle

    def _loaded(self, lm: nn.Module, adapter: Path) -> Patch:
        """The weights of an adapter under this arm's settings, not installed."""
        with load_adapter(lm, adapter) as handle:
            trained = handle
        wanted = CacheConfig.from_fields(self.settings)
        if not same_settings(lm, trained.config, replace(wanted, reset_memory=False)):
            raise ValueError(
                f"adapter: {adapter} was trained with other settings than those of {self.name}"
            )
        if wanted.reset_memory:
            own = prepare(lm, replace(trained.config, reset_memory=True))
            for layer, cache in own.caches.items():
                cache.load_state_dict(trained.caches[layer].state_dict())
            return own
        return trained


def _drawn(lm: nn.Module, settings: Mapping[str, Any]) -> Patch:
    """A patch with the same random weights every time, not installed."""
    with torch.random.fork_rng():
        torch.manual_seed(UNTRAINED_SEED)
        return prepare(lm, CacheConfig.from_fields(settings))


def same_settings(lm: nn.Module, one: CacheConfig, other: CacheConfig) -> bool:
    """Whether two configs mean the same on a model; a preset's name, and `bptt`, mean nothing."""
    return described(lm, one) == described(lm, other)


def described(lm: nn.Module, config: CacheConfig) -> dict[str, Any]:
    """A config as JSON, with what says the same written the same."""
    layers = len(find_transformer(lm).layers)
    chosen = range(layers) if config.layers is None else (n % layers for n in config.layers)
    plain = replace(config, layers=tuple(sorted(chosen)), preset=None, bptt=None)
    return {name: _plain(value) for name, value in plain.to_json().items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(value[key]) for key in sorted(value)}
    return list(value) if isinstance(value, tuple) else value


def context_of(lm: nn.Module) -> int:
    """Frames in the ring of stock Moshi; of its first layer."""
    context = find_transformer(lm).layers[0].self_attn.context  # type: ignore[union-attr]
    if not isinstance(context, int):
        raise ValueError("model must have a context to be compared with, got context=None")
    return context


def hybrid_layer(layers: int) -> int:
    """The plan's layer 30 of 32, in a model of `layers` layers."""
    return round(HYBRID_LAYER * (layers - 1))


def controls(context: int, layers: int, settings: Mapping[str, Any], frames: int) -> dict[str, Arm]:
    """The memory with these settings beside every control of the plan, by name.

    Args:
        context: frames in stock Moshi's ring.
        layers: of the model.
        settings: of the memory: keywords of `ttt_cache.patch`.
        frames: of the longest conversation: what full context has to hold.
    """
    whole = CacheConfig.from_fields(settings)
    kept = {name: settings[name] for name in ("layers", "recent", "chunk") if name in settings}
    hybrid = {
        name: settings[name]
        for name in ("memory_heads", "memory_dim", "hidden_dim", "chunk")
        if name in settings
    }
    bare = _bare(settings)
    slots = {**settings, "gate": "joint", "source": "hidden", "read": "virtual"}
    arms = [
        Arm("full", "every frame is kept", {"memory": "none", "recent": max(frames, context)}),
        Arm("stock", f"Moshi's own ring of {context} frames", {"memory": "none", "recent": None}),
        Arm(
            "extended",
            f"a ring of {round(EXTENDED * context)} frames, beyond what the model was trained with",
            {"memory": "none", "recent": round(EXTENDED * context)},
        ),
        window(settings),
        Arm("longest", "a window that always has as many frames as theirs at its longest", bare),
        Arm(
            "sinks",
            f"the window and the first {SINKS} frames",
            {**kept, "memory": "none", "sinks": SINKS},
        ),
        Arm("mean", "one token: the mean of what is older", {**kept, "memory": "mean"}),
        Arm(
            "cluster",
            "running clusters of what is older, without training",
            {**kept, "memory": "cluster", "virtual": whole.virtual},
        ),
        Arm(
            "random",
            "random virtual tokens, the same for every input; how they are read is trained",
            {**slots, "memory": "random"},
            trained=True,
        ),
        Arm(
            "reset",
            "the trained memory, put back to its start before every read",
            {**settings, "reset_memory": True},
            trained=True,
        ),
        Arm(
            "hybrid",
            "stock attention, then a gated TTT-MLP on its output, in one layer",
            {**hybrid, "preset": "hybrid", "layers": (hybrid_layer(layers),)},
            trained=True,
            recipe=HYBRID,
        ),
        Arm("hierarchical", "the window and the trained memory", settings, trained=True),
    ]
    return {arm.name: arm for arm in arms}


def window(settings: Mapping[str, Any]) -> Arm:
    """The window that goes with a memory of these settings, and nothing of the memory.

    Where frames leave a memory's window in chunks, it has a memory without a share in the output,
    so that it waits for whole chunks as theirs does.
    """
    about = "the frames that the memory's layers see exactly, and nothing of the memory"
    bare = _bare(settings)
    if settings.get("write") == "arrived":
        return Arm("window", about, bare)
    waiting = {**bare, "recent": settings.get("recent", CacheConfig().recent)}
    waiting |= {"memory": "mean", "gate": "fixed", "alpha": 1.0}
    return Arm("window", about, waiting, lean=bare)


def _bare(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A window of what one with a memory holds just before a chunk leaves it."""
    config = CacheConfig.from_fields(settings)
    waiting = 0 if config.write == "arrived" else config.chunk - 1
    recent = config.recent
    if isinstance(recent, Mapping):
        recent = {layer: frames + waiting for layer, frames in recent.items()}
    elif recent is not None:
        recent += waiting
    names = "layers", "chunk", "sinks"
    kept = {name: settings[name] for name in names if name in settings}
    return {**kept, "memory": "none", "recent": recent}
