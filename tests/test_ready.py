"""Virtual tokens that lie ready: derived from state and weights, and never older than they are."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import Case, assert_near
from torch.func import functional_call

from ttt_cache import CacheConfig, CacheState, HierarchicalCache, ready

SMALL = {"recent": 3, "virtual": 2, "chunk": 4, "memory_heads": 2, "memory_dim": 4, "hidden_dim": 8}
CASE = Case(CacheConfig(**SMALL, position="slot"), num_heads=4, kv_heads=2)
ROWS = 2
ALL = torch.ones(ROWS, dtype=torch.bool)
FIRST = torch.tensor([True, False])

Change = Callable[[HierarchicalCache, CacheState], CacheState | None]


def answer(cache: HierarchicalCache, state: CacheState, absorbed: bool, seed: int) -> torch.Tensor:
    """One token's output, read as the step would or with weights absorbed."""
    torch.manual_seed(seed)
    tokens = CASE.tokens(ROWS, 1)
    with pytest.MonkeyPatch.context() as patch:
        if absorbed:
            patch.setattr(ready, "_pays", lambda *_: False)  # weights are absorbed
        return cache.stream(*tokens, state)


def assert_fresh(cache: HierarchicalCache, state: CacheState, seed: int = 0) -> None:
    """A step reads what one without anything at hand would, and leaves the same state."""
    other = state.clone()
    expected = answer(cache, other, True, seed)
    assert_near(answer(cache, state, False, seed), expected, 1e-10)
    for (name, mine), (_, theirs) in zip(state.tensors(), other.tensors(), strict=True):
        assert torch.equal(mine, theirs), name


def begun(steps: int = 9) -> tuple[HierarchicalCache, CacheState]:
    """A cache and a state in the middle of a chunk, with tokens at hand."""
    cache = CASE.build_stirred()
    state = cache.init_state(ROWS)
    for token in CASE.tokens(ROWS, steps).split([1] * steps):
        cache.stream(*token, state)
    assert state.ready.made
    return cache, state


def calls(monkeypatch) -> list[int]:
    """How many rows every making of tokens from now on is for."""
    made: list[int] = []
    make = ready.LatentTokens.make

    def counted(reader, tokens, readout):
        made.append(len(readout))
        make(reader, tokens, readout)

    monkeypatch.setattr(ready.LatentTokens, "make", counted)
    return made


def other_state(cache: HierarchicalCache) -> CacheState:
    """That of other conversations, as far."""
    state = cache.init_state(ROWS)
    torch.manual_seed(5)
    for token in CASE.tokens(ROWS, 9).split([1] * 9):
        cache.stream(*token, state)
    return state


def reset(_, state):
    state.reset(FIRST)


def erased(_, state):
    state.reset(ALL)


def committed(cache, state):
    state.commit(other_state(cache), FIRST)


def loaded(cache, state):
    for (_, mine), (_, theirs) in zip(state.tensors(), other_state(cache).tensors(), strict=True):
        mine.copy_(theirs)


def refilled(cache, state):
    return state.filled(dict(other_state(cache).tensors()))


def rebound(cache, state):
    state.readout = other_state(cache).readout


def swapped(_, state):
    return state.map(lambda t: t.flip(0))


def by_hand(_, state):
    state.readout[1, 0, 0] += 1


def past_the_counter(_, state):
    state.readout.data.mul_(2)


def trained(cache, _):
    with torch.no_grad():
        for parameter in cache.reader.parameters():
            parameter.mul_(2)


def of_nothing(cache, state):
    trained(cache, state)
    state.readout.zero_()


def several_tokens(cache, state):
    cache.stream(*CASE.tokens(ROWS, 6), state)


def nothing(cache, state):
    pass


def copied(cache, state):
    return deepcopy(state)


def one_weight(cache, _):
    with torch.no_grad():
        cache.reader.to_value[1, 2, 3] += 1


def replaced(cache, _):
    for name in ("to_key", "to_value", "slot_key"):
        setattr(cache.reader, name, torch.nn.Parameter(getattr(cache.reader, name) * 2))


def given_other_data(cache, _):
    for parameter in cache.reader.parameters():
        parameter.data = parameter.data * 2


def loaded_weights(cache, _):
    other = CASE.build_stirred()
    cache.load_state_dict({name: -t for name, t in other.state_dict().items()})


CHANGES: list[Change] = [
    *(nothing, reset, erased, committed, loaded, refilled, rebound, swapped, by_hand, copied),
    *(
        past_the_counter,
        of_nothing,
        several_tokens,
        trained,
        one_weight,
        replaced,
        given_other_data,
    ),
    loaded_weights,
]


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_stale_is_read(change):
    cache, state = begun()
    state = change(cache, state) or state
    for seed in range(3):
        assert_fresh(cache, state, seed)


@given(data=st.data())
def test_nothing_stale_is_read_in_any_order(data):
    cache, state = begun(data.draw(st.integers(7, 14)))
    for seed, change in enumerate(data.draw(st.lists(st.sampled_from(CHANGES), max_size=4))):
        state = change(cache, state) or state
        mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=ROWS, max_size=ROWS)))
        cache.stream(*CASE.tokens(ROWS, 1), state, mask)  # rows get out of phase
        assert_fresh(cache, state, seed)


class Streamed(torch.nn.Module):
    """Whose `forward` is a step, as `functional_call` needs it."""

    def __init__(self, cache: HierarchicalCache) -> None:
        super().__init__()
        self.cache = cache

    def forward(self, state: CacheState, absorbed: bool) -> torch.Tensor:
        return answer(self.cache, state, absorbed, seed=0)


def test_lent_weights_are_seen():
    cache, state = begun()
    streamed = Streamed(cache)
    lent = {name: weight.detach() * 2 for name, weight in streamed.named_parameters()}
    for weights in ({}, lent, {}):
        expected = functional_call(streamed, weights, (state.clone(), True))
        assert_near(functional_call(streamed, weights, (state, False)), expected, 1e-10)


def test_tokens_are_made_once_for_a_version_and_a_row(monkeypatch):
    cache, state = begun()
    made = calls(monkeypatch)
    ahead = torch.tensor([False, True])
    cache.stream(*CASE.tokens(ROWS, 1), state, ahead)
    for token in CASE.tokens(ROWS, 6).split([1] * 6):
        cache.stream(*token, state)
    assert made == [1, 1, 1, 1]  # after 11 and 15 tokens of each row


def test_an_interruption_leaves_nothing_stale(monkeypatch):
    def interrupted(_, tokens, readout):
        tokens["keys"].fill_(7)
        raise KeyboardInterrupt

    cache, state = begun()
    before = state.readout.clone()
    state.readout.mul_(2)
    with monkeypatch.context() as patch:
        patch.setattr(ready.LatentTokens, "make", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.stream(*CASE.tokens(ROWS, 1), state)
    state.readout.copy_(before)
    assert_fresh(cache, state)


def test_a_state_shares_its_tokens_with_no_other():
    _, state = begun()
    for other in (state.clone(), state.detach(), state.filled(dict(state.tensors()))):
        assert other.ready is not state.ready
        assert not other.ready.made


def test_they_are_no_part_of_the_state():
    cache, state = begun()
    assert {name for name, _ in state.tensors()} == set(cache.layout)
    assert state.nbytes == cache.init_state(ROWS).nbytes


def test_inference_mode_comes_and_goes():
    cache, state = begun()
    state = state.clone()  # nothing is made yet
    for within in (True, False, True):
        with torch.inference_mode(within):
            for seed in range(CASE.config.chunk + 1):
                assert_fresh(cache, state, seed)


def test_weights_that_do_not_count_what_is_written_are_absorbed():
    with torch.inference_mode():
        cache = CASE.build_stirred()
        state = cache.init_state(ROWS)
        for token in CASE.tokens(ROWS, 9).split([1] * 9):
            cache.stream(*token, state)
        assert not state.ready.made
        cache.reader.to_key.mul_(2)
        assert_fresh(cache, state)


@pytest.mark.parametrize(
    ("batch", "changes", "expected"),
    [
        (1, {}, True),
        (4, {}, True),
        (8, {}, False),  # rows out of phase read the weights in nearly every step
        (1, {"chunk": 1}, False),
        (1, {"virtual": 300}, False),
        (1, {"virtual": 200}, True),
    ],
)
def test_they_are_made_where_that_pays(batch, changes, expected):
    case = Case(CacheConfig(**({"recent": 9, "memory_dim": 4, "hidden_dim": 8} | changes)))
    cache = case.build()
    state = cache.init_state(batch)
    cache.stream(*case.tokens(batch, 1), state)
    assert bool(state.ready.made) is expected


def test_the_projection_is_read_in_order():
    cache = CASE.build()
    copies = deepcopy(cache), cache.float()
    for one in (cache, *copies):
        assert one.memory.project.t().is_contiguous()
