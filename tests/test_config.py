"""Settings: presets, what excludes what, bad values."""

from __future__ import annotations

import itertools
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from models import SMALL, tiny_lm

import ttt_cache
from ttt_cache import CacheConfig
from ttt_cache.config import CHOICES, GATES
from ttt_cache.presets import DOCS, PRESETS

REPOSITORY = Path(__file__).parent.parent
LAYER = {"recent": 0, "read": "query", "write": "arrived"}  # a TTT layer

# The plan's table (section 4 of the design): the settings that its rows name.
PLAN: dict[str, dict[str, Any]] = {
    "hierarchical": {"read": "virtual", "source": "hidden", "gate": "head"},
    "single-token": {"virtual": 1},
    "kv-pairs": {"read": "virtual", "source": "kv", "gate": "joint"},
    "memory-bank": {"read": "virtual", "source": "hidden", "gate": "joint"},
    "ttt-window": {"read": "query", "recent": 100, "gate": "head"},
    "ttt-linear-layer": LAYER | {"memory": "ttt-linear"},
    "ttt-mlp-layer": LAYER | {"memory": "ttt-mlp"},
    "hybrid": {
        "source": "output",
        "read": "query",
        "write": "arrived",
        "recent": None,
        "gate": "residual",
    },
    "window": {"memory": "none"},
    "streaming-llm": {"memory": "none", "sinks": 4},
    "mean": {"memory": "mean"},
    "cluster": {"memory": "cluster"},
    "random": {"memory": "random"},
    "memory-reset": {"reset_memory": True},
    "full-context": {"memory": "none", "recent": None},
    "extended-context": {"memory": "none", "recent": 8000},
}


def test_every_row_of_the_plan_has_a_preset():
    assert set(PRESETS) == set(PLAN)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_the_plan_says_and_defaults_otherwise(name):
    config, default = CacheConfig(preset=name), CacheConfig()
    for field in fields(CacheConfig):
        expected = PLAN[name].get(field.name, getattr(default, field.name))
        if field.name == "gate" and PLAN[name].get("read") == "query":
            expected = PLAN[name].get("gate", "head")
        if field.name != "preset":
            assert getattr(config, field.name) == expected, field.name
    assert CacheConfig.from_fields(config.to_json()) == config


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_explained(name):
    preset = PRESETS[name]
    assert re.fullmatch(r"[A-Z][^.]*\.", preset.about), "one sentence"
    page = (REPOSITORY / DOCS).read_text()
    assert f"\n## {preset.section}\n" in page
    assert f"`{name}`" in page


def test_what_is_given_goes_before_the_preset():
    config = CacheConfig(preset="hybrid", recent=50, gate="head")
    assert (config.recent, config.gate, config.source) == (50, "head", "output")
    assert replace(config, chunk=3).recent == 50
    assert CacheConfig(preset="single-token", virtual=10).virtual == 10  # the default, but given
    assert CacheConfig(preset="hybrid", gate=None).gate == "residual"


def test_per_layer_gates_beside_layers_without_a_window():
    mixed = LAYER | {"recent": {0: 0, 1: 5}, "gate": {0: "head", 1: "residual"}}
    with ttt_cache.patch(tiny_lm(), layers=[0, 1], **mixed) as handle:
        assert handle.caches[0].gate is None
        assert handle.caches[1].gate.kind == "residual"
    mixed["gate"][0] = "layer"
    with pytest.raises(ValueError, match="recent=0 and gate='layer' exclude each other"):
        ttt_cache.patch(tiny_lm(), layers=[0, 1], **mixed)


def test_patch_takes_a_preset_and_overrides():
    model = tiny_lm()
    with ttt_cache.patch(model, preset="hybrid", layers=[1], chunk=2) as handle:
        assert handle.config.recent is None  # an adapter means the context of any model
        assert handle.caches[1].window.recent == 64  # here that of this one
        assert handle.config.gate == "residual"
        assert handle.config.chunk == 2
    with ttt_cache.patch(model, preset="full-context") as handle:
        assert [cache.window.recent for cache in handle.caches.values()] == [64] * 3
    with pytest.raises(ValueError, match=r"preset must be one of memory-bank, .*got 'nothing'"):
        ttt_cache.patch(model, preset="nothing")
    with pytest.raises(ValueError, match=r"layer 0: recent=None is .*context, and it has none"):
        ttt_cache.patch(tiny_lm(context=None), preset="hybrid")
    with pytest.raises(ValueError, match="recent must be within the context 64 of layer 0"):
        ttt_cache.patch(model, preset="hybrid", recent=65)


EXCLUSIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"recent": 0}, "recent=0", "read='virtual'"),
    ({"recent": 0, "read": "query"}, "recent=0", "write='evicted'"),
    (LAYER | {"memory": "none"}, "recent=0", "memory='none'"),
    (LAYER | {"sinks": 2}, "recent=0", "sinks=2"),
    (LAYER | {"source": "output"}, "recent=0", "source='output'"),
    (LAYER | {"reset_memory": True}, "recent=0", "reset_memory=True"),
    *((LAYER | {"gate": g}, "recent=0", f"gate='{g}'") for g in GATES if g != "head"),
    *(
        ({"read": "query", "memory": m}, "read='query'", f"memory='{m}'")
        for m in ("mean", "cluster", "random")
    ),
    ({"read": "query", "gate": "joint"}, "read='query'", "gate='joint'"),
    ({"read": "query", "position": "slot"}, "read='query'", "position='slot'"),
    *(
        ({"memory": memory} | other, f"memory='{memory}'", word)
        for memory in ("mean", "cluster")
        for other, word in (
            ({"source": "output"}, "source='output'"),
            ({"position": "decay"}, "position='decay'"),
        )
    ),
    ({"memory": "ttt-linear", "depth": 3}, "memory='ttt-linear'", "depth=3"),
    ({"position": "decay", "virtual": 1}, "position='decay'", "virtual=1"),
    ({"share": True, "virtual": {0: 2, 1: 3}}, "share=True", "virtual={0: 2, 1: 3}"),
    ({"write": "arrived", "recent": 2, "chunk": 4}, "recent=2", "chunk=4"),
]


@pytest.mark.parametrize(("settings", "one", "other"), EXCLUSIONS)
def test_settings_that_exclude_each_other(settings, one, other):
    with pytest.raises(ValueError, match=r"exclude each other: [a-z]") as caught:
        CacheConfig(**settings)
    assert str(caught.value).startswith(f"{one} and {other} exclude each other: ")


@pytest.mark.parametrize(
    "mapping",
    [
        {"recent": {0: 0, 1: 5, 2: 5}},
        {"read": "query", "gate": {0: "head", 1: "joint", 2: "head"}},
        {"position": "decay", "virtual": {0: 1, 1: 2, 2: 2}},
    ],
)
def test_exclusions_hold_in_each_layer(mapping):
    model = tiny_lm()
    with pytest.raises(ValueError, match=r"^layer [01]: .* exclude each other"):
        ttt_cache.patch(model, **(SMALL | mapping))
    ttt_cache.patch(model, **SMALL).remove()  # nothing is left behind


def test_what_is_not_excluded_can_be_built():
    """Every pair of choices either makes a config or is refused with a reason."""
    allowed = {**CHOICES, "gate": GATES, "recent": (0, 5), "depth": (2, 3), "sinks": (0, 1)}
    for (one, firsts), (other, seconds) in itertools.combinations(allowed.items(), 2):
        for first, second in itertools.product(firsts, seconds):
            try:
                config = CacheConfig(**{one: first, other: second})
            except ValueError as refused:
                assert "exclude each other: " in str(refused)
            else:
                ttt_cache.HierarchicalCache(config, dim=8, num_heads=2, head_dim=4)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"memory": "lstm"}, ValueError, "memory must be one of ttt-mlp, ttt-linear, .* 'lstm'"),
        ({"source": "keys"}, ValueError, "source must be one of hidden, kv, output, got 'keys'"),
        ({"read": 1}, TypeError, "read must be one of virtual, query, got 1"),
        ({"write": "late"}, ValueError, "write must be one of evicted, arrived, got 'late'"),
        ({"position": "rope"}, ValueError, "position must be one of none, slot, decay"),
        ({"depth": 1}, ValueError, "depth must be 2 or 3, got 1"),
        ({"depth": 10}, ValueError, "depth must be 2 or 3, got 10"),
        ({"depth": 2.0}, TypeError, "depth must be an integer, got 2.0"),
        ({"recent": -1}, ValueError, "recent must be at least 0, got -1"),
        ({"share": 1}, TypeError, "share must be True or False, got 1"),
        ({"reset_memory": "no"}, TypeError, "reset_memory must be True or False, got 'no'"),
        ({"preset": 3}, TypeError, "preset must be one of memory-bank, .*, got 3"),
        ({"gate": "both"}, ValueError, "gate must be one of joint, .*, got 'both'"),
        ({"presets": "mean"}, TypeError, "presets"),
    ],
)
def test_bad_values(settings, error, words):
    with pytest.raises(error, match=words):
        CacheConfig(**settings)
    with pytest.raises(error, match=words):
        ttt_cache.patch(tiny_lm(), **settings)


def test_a_context_is_looked_up_by_patch_only():
    with pytest.raises(ValueError, match="recent must be a number here"):
        ttt_cache.HierarchicalCache(CacheConfig(recent=None), dim=8, num_heads=2, head_dim=4)
