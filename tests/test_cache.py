"""HierarchicalCache by itself: sizes, bad input, and that neither form changes what it is given."""

from __future__ import annotations

import pytest
import torch

from ttt_cache import CacheConfig, HierarchicalCache
from ttt_cache.presets import PRESETS

SMALL = CacheConfig(recent=4, virtual=2, chunk=3, memory_heads=2, memory_dim=4, hidden_dim=6)
SIZES = {"dim": 12, "num_heads": 4, "head_dim": 6, "kv_heads": 2}


def inputs(length: int = 5, batch: int = 2, **replaced: torch.Tensor) -> dict[str, torch.Tensor]:
    shapes = {"q": (4, length, 6), "k": (2, length, 6), "v": (2, length, 6), "x": (length, 12)}
    return {name: torch.randn(batch, *shape) for name, shape in shapes.items()} | replaced


@pytest.mark.parametrize(
    ("replaced", "error", "words"),
    [
        ({"q": torch.zeros(2, 3, 5, 6)}, ValueError, ["q", "[2, 4, 5, 6]", "[2, 3, 5, 6]"]),
        ({"q": torch.zeros(2, 4, 6)}, ValueError, ["q", "T"]),
        ({"q": torch.zeros(2, 4, 0, 6)}, ValueError, ["q", "at least 1"]),
        ({"q": torch.zeros(0, 4, 5, 6)}, ValueError, ["q", "at least 1"]),
        ({"k": torch.zeros(2, 4, 5, 6)}, ValueError, ["k", "[2, 2, 5, 6]"]),
        ({"v": torch.zeros(1, 2, 5, 6)}, ValueError, ["v", "[1, 2, 5, 6]"]),
        ({"x": torch.zeros(2, 5, 11)}, ValueError, ["x", "[2, 5, 12]"]),
        ({"q": torch.zeros(2, 4, 5, 6, dtype=torch.long)}, TypeError, ["q", "int64"]),
        ({"x": None}, TypeError, ["x", "None"]),
        ({"q": torch.zeros(2, 4, 5, 6).double()}, TypeError, ["q, k and v", "float64", "float32"]),
        ({"v": torch.zeros(2, 2, 5, 6).half()}, TypeError, ["q, k and v", "float16"]),
    ],
)
def test_wrong_tensors_are_refused_by_both_forms(replaced, error, words):
    cache = HierarchicalCache(SMALL, **SIZES)
    state = cache.init_state(2)
    given = inputs(**replaced)
    for call in (cache, lambda **kw: cache.stream(state=state, **kw)):
        with pytest.raises(error) as caught:
            call(**given)
        assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not any(t.any() for _, t in state.tensors())


def test_wrong_states_and_masks_are_refused():
    cache = HierarchicalCache(SMALL, **SIZES)
    other = HierarchicalCache(CacheConfig(recent=9, memory="none"), **SIZES)
    with pytest.raises(ValueError, match="state"):
        cache(**inputs(), state=cache.init_state(3))
    with pytest.raises(ValueError, match="state"):
        cache.stream(**inputs(), state=other.init_state(2))
    with pytest.raises(TypeError, match="state"):
        cache(**inputs(), state={"count": 0})
    state = cache.init_state(2)
    with pytest.raises(ValueError, match=r"exec_mask must have shape \[2\], got \[3\]"):
        cache.stream(**inputs(), state=state, exec_mask=torch.ones(3, dtype=torch.bool))
    for mask in (torch.ones(2), [True, False]):
        with pytest.raises(TypeError, match="exec_mask must be a bool tensor"):
            cache.stream(**inputs(), state=state, exec_mask=mask)
    elsewhere = torch.ones(2, dtype=torch.bool, device="meta")
    with pytest.raises(ValueError, match="exec_mask must be on cpu as the state is, got meta"):
        cache.stream(**inputs(), state=state, exec_mask=elsewhere)
    with pytest.raises(ValueError, match="x must be on meta as the state is, got cpu"):
        cache.stream(**inputs(), state=state.map(lambda tensor: tensor.to("meta")))
    with pytest.raises(ValueError, match=r"mask must have shape \[2\], got \[1\]"):
        state.reset(torch.tensor([True]))
    for mask in (torch.tensor([1, 0]), [True, False]):
        with pytest.raises(TypeError, match="mask must be a bool tensor"):
            state.reset(mask)
    assert not any(t.any() for _, t in state.tensors())
    for batch in (0, -1):
        with pytest.raises(ValueError, match="batch_size"):
            cache.init_state(batch)


@pytest.mark.parametrize(
    ("changes", "error", "word"),
    [
        ({"dim": 0}, ValueError, "dim"),
        ({"num_heads": -1}, ValueError, "num_heads"),
        ({"head_dim": 2.0}, TypeError, "head_dim"),
        ({"kv_heads": 3}, ValueError, "kv_heads"),
        ({"config": {"recent": 4}}, TypeError, "config"),
        ({"rope": 5}, TypeError, "rope"),
        ({"dtype": torch.int32}, TypeError, "dtype"),
        ({"config": CacheConfig(recent={0: 4})}, TypeError, "recent"),
        ({"config": CacheConfig(virtual={0: 4})}, TypeError, "virtual"),
        ({"config": CacheConfig(gate={0: "head"})}, TypeError, "gate"),
    ],
)
def test_wrong_sizes_are_refused(changes, error, word):
    with pytest.raises(error, match=word):
        HierarchicalCache(**({"config": SMALL} | SIZES | changes))


@pytest.mark.parametrize(
    "other", [{"sinks": 2}, {"hidden_dim": 7}, {"virtual": 3}, {"memory": "mean"}, {"chunk": 4}]
)
def test_states_of_other_caches_are_refused(other):
    cache = HierarchicalCache(SMALL, **SIZES)
    foreign = HierarchicalCache(CacheConfig(**(SMALL.to_json() | other)), **SIZES).init_state(2)
    for call in (cache, cache.stream):
        with pytest.raises(ValueError, match="state must hold"):
            call(**inputs(1), state=foreign)
    assert not any(t.any() for _, t in foreign.tensors())


def test_inputs_in_another_dtype_than_the_state_are_refused():
    cache = HierarchicalCache(SMALL, **SIZES)
    state = cache.init_state(2)
    wide = {name: tensor.double() for name, tensor in inputs(1).items()}
    for call in (cache, cache.stream):
        with pytest.raises(TypeError, match=r"q, k and v must be torch.float32"):
            call(**wide, state=state)
    assert not any(t.any() for _, t in state.tensors())


def test_float16_scores_and_projections_do_not_overflow():
    sizes = SIZES | {"head_dim": 64, "num_heads": 2}
    cache = HierarchicalCache(SMALL, **sizes, dtype=torch.float16)
    big = torch.full((1, 2, 9, 64), 40.0, dtype=torch.float16)
    x = torch.full((1, 9, 12), 6e4, dtype=torch.float16)
    y, state = cache(big, big, big, x)
    assert y.isfinite().all()
    assert all(t.isfinite().all() for _, t in state.tensors() if t.dtype == torch.float32)


def small(preset: str) -> HierarchicalCache:
    sizes = {"chunk": 3, "memory_heads": 2, "memory_dim": 4, "hidden_dim": 6}
    recent = 0 if CacheConfig(preset=preset).recent == 0 else 4
    return HierarchicalCache(CacheConfig(preset=preset, recent=recent, **sizes), **SIZES)


@pytest.mark.parametrize("preset", PRESETS)
def test_both_forms_run_on_the_meta_device(preset):
    """So no step looks at its data: the meta device has none to look at."""
    cache = small(preset).to("meta")
    given = {name: tensor.to("meta") for name, tensor in inputs(9).items()}
    y, state = cache(**given)
    one = {name: t[..., :1, :] for name, t in given.items()}
    assert y.shape == (2, 4, 9, 6)
    assert cache.stream(**one, state=state).shape == (2, 4, 1, 6)


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_the_parallel_form_leaves_its_state_alone(preset):
    cache = small(preset)
    _, state = cache(**inputs(11))
    kept = state.clone()
    cache(**inputs(13), state=state)
    pairs = zip(kept.tensors(), state.tensors(), strict=True)
    assert all(torch.equal(old, now) for (_, old), (_, now) in pairs)


@pytest.mark.parametrize("preset", PRESETS)
def test_streaming_makes_no_gradients_and_no_new_tensors(preset):
    cache = small(preset)
    state = cache.init_state(2)
    places = {name: t.data_ptr() for name, t in state.tensors()}
    for length in (1, 1, 6, 1, 9):
        given = {name: t.requires_grad_() for name, t in inputs(length).items()}
        assert not cache.stream(**given, state=state).requires_grad
    assert {name: t.data_ptr() for name, t in state.tensors()} == places
    assert state.count.tolist() == [18, 18]


def test_config_round_trips_through_json():
    config = CacheConfig(layers=range(-3, 0), recent={0: 5, 1: 6}, gate={0: "head", 1: "joint"})
    assert CacheConfig.from_fields(config.to_json()) == config
    assert config.layers == (-3, -2, -1)
    assert config.for_layer(1).recent == 6 and config.for_layer(0).gate == "head"
