"""The model that is evaluated, what it hears, and the settings of the memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moshi.models.lm import LMModel

from ttt_cache import testbed
from ttt_cache.adapter import locate, read_config
from ttt_cache.config import CacheConfig
from ttt_cache.targets import find_transformer

from .arms import Arm, context_of, controls, same_settings
from .source import Source

# State of at most an eighth of the testbed's ring, recent a thirty-second of its context.
TESTBED_SETTINGS: dict[str, Any] = {
    "recent": 32,
    "chunk": 8,
    "virtual": 48,
    "memory_heads": 4,
    "memory_dim": 32,
    "hidden_dim": 80,
}


@dataclass(frozen=True)
class Subject:
    """What every experiment is given.

    Attributes:
        lm: frozen, not patched, in eval mode.
        name: of the model, for people.
        source: conversations to measure on.
        taught: conversations to train on, by default of the same kind.
        other: conversations of another kind, for generalisation.
        settings: of the memory: keywords of `ttt_cache.patch`.
        adapter: trained weights of exactly these settings, given by the user.
        is_testbed: it is the shipped model.
        seed: of conversations, training and sampling.
    """

    lm: LMModel
    name: str
    source: Source
    taught: Source | None = None
    other: Source | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    adapter: Path | None = None
    is_testbed: bool = False
    seed: int = 0

    @property
    def context(self) -> int:
        """Frames in stock Moshi's ring."""
        return context_of(self.lm)

    @property
    def layers(self) -> int:
        return len(find_transformer(self.lm).layers)

    @property
    def far(self) -> int:
        """Frames after which what was said has left the memory's window: all layers, the most."""
        return frames_seen(self.settings) or self.context

    def arms(self, frames: int) -> dict[str, Arm]:
        """The memory and all controls, by name; `frames`: of the longest conversation."""
        return controls(self.context, self.layers, self.settings, frames)

    def trained_already(self, arm: Arm) -> Path | None:
        """The user's adapter, or a shipped one, where it is of an arm's settings."""
        wanted = CacheConfig.from_fields(arm.lesson)
        candidates = [] if self.adapter is None else [self.adapter]
        if self.is_testbed:
            shipped = testbed.FOLDER / "adapters"
            candidates += sorted(shipped.iterdir()) if shipped.is_dir() else []
        for folder in candidates:
            if same_settings(self.lm, adapter_config(folder), wanted):
                return folder
        return None


def frames_seen(settings: Mapping[str, Any]) -> int:
    """Frames that a layer with a memory sees exactly when a chunk is about to leave its window, and
    one more: all layers, the most. 0 where that is the layer's whole context."""
    config = CacheConfig.from_fields(settings)
    recents = config.recent.values() if isinstance(config.recent, Mapping) else [config.recent]
    known = [recent + config.chunk for recent in recents if recent is not None]
    return max(known) if len(known) == len(recents) else 0


def adapter_config(folder: Path) -> CacheConfig:
    """The settings of an adapter on disk."""
    return CacheConfig.from_fields(read_config(locate(folder)[0])["config"])
