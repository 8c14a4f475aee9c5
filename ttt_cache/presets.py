"""Named settings: every system that the one mechanism spans, and the controls beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .checks import one_of

DOCS = "docs/presets.md"


@dataclass(frozen=True)
class Preset:
    """Settings under a name.

    Attributes:
        about: one sentence.
        section: heading of `docs/presets.md` that explains it.
        settings: fields of `CacheConfig`; what is not named has its default.
    """

    about: str
    section: str
    settings: dict[str, Any]


_TTT_LAYER = {"read": "query", "write": "arrived", "recent": 0}

PRESETS: dict[str, Preset] = {
    "memory-bank": Preset(
        "The default: virtual tokens read from a TTT-MLP share one softmax with the window.",
        "Virtual tokens",
        {},
    ),
    "hierarchical": Preset(
        "The same memory, mixed with the window by a learned share for each head.",
        "Virtual tokens",
        {"gate": "head"},
    ),
    "single-token": Preset(
        "Everything older than the window in one virtual token.",
        "Virtual tokens",
        {"virtual": 1},
    ),
    "kv-pairs": Preset(
        "The memory learns the keys and values of the attention instead of hidden states.",
        "Virtual tokens",
        {"source": "kv"},
    ),
    "ttt-window": Preset(
        "A window, and a TTT-MLP that is asked with each token's own query.",
        "TTT layers",
        {"read": "query", "gate": "head"},
    ),
    "ttt-linear-layer": Preset(
        "TTT-Linear in place of attention: no window at all.",
        "TTT layers",
        {**_TTT_LAYER, "memory": "ttt-linear"},
    ),
    "ttt-mlp-layer": Preset(
        "TTT-MLP in place of attention: no window at all.",
        "TTT layers",
        {**_TTT_LAYER, "memory": "ttt-mlp"},
    ),
    "hybrid": Preset(
        "Full attention, then a gated TTT-MLP on its output; starts as the identity.",
        "TTT layers",
        {
            "source": "output",
            "read": "query",
            "write": "arrived",
            "recent": None,
            "gate": "residual",
        },
    ),
    "window": Preset(
        "Control: the window and nothing else.",
        "Controls",
        {"memory": "none"},
    ),
    "streaming-llm": Preset(
        "Control: the window and four attention sinks.",
        "Controls",
        {"memory": "none", "sinks": 4},
    ),
    "mean": Preset(
        "Control: one virtual token, the mean of all older keys and values.",
        "Controls",
        {"memory": "mean"},
    ),
    "cluster": Preset(
        "No training: running clusters of the older keys, weighted by their counts.",
        "Controls",
        {"memory": "cluster"},
    ),
    "random": Preset(
        "Control: random virtual tokens, the same for every input.",
        "Controls",
        {"memory": "random"},
    ),
    "memory-reset": Preset(
        "Control: the default, with its memory put back to version 0 before every read.",
        "Controls",
        {"reset_memory": True},
    ),
    "full-context": Preset(
        "Control: the layer's whole context, as in stock Moshi (3000 frames).",
        "Controls",
        {"memory": "none", "recent": None},
    ),
    "extended-context": Preset(
        "Control: a window of 8000 frames, beyond what Moshi was trained with.",
        "Controls",
        {"memory": "none", "recent": 8000},
    ),
}


def settings_of(name: str | None) -> dict[str, Any]:
    """The settings of a preset; none for `None`.

    Raises:
        TypeError, ValueError: there is no such preset.
    """
    if name is None:
        return {}
    return dict(PRESETS[one_of("preset", name, tuple(PRESETS))].settings)
