"""Every statement of `docs/semantics.md` about outputs and state, on drawn settings."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Oracle
from strategies import (
    FLOAT64,
    MIXING_GATES,
    WITH_MEMORY,
    cases,
    every_system,
    masks,
    splits,
)
from support import TOLERANCE, Case, Session, Tokens, assert_near, bits
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ttt_cache import CacheConfig, CacheState, HierarchicalCache

BATCH = 3


# The forms


@every_system()
def test_parallel_form(data, case):
    length = data.draw(st.integers(1, case.capacity + 25))
    Session(case, case.build_stirred(), 2).forward(case.tokens(2, length))


@every_system()
def test_parallel_form_in_several_calls(data, case):
    session = Session(case, case.build_stirred(), 2)
    for length in data.draw(splits(case)):
        session.forward(case.tokens(2, length))


@every_system()
def test_streaming_token_by_token(data, case):
    session = Session(case, case.build_stirred(), 2)
    for _ in range(data.draw(st.integers(1, case.capacity + 25))):
        session.stream(case.tokens(2, 1))


@every_system()
def test_streaming_in_calls_of_any_length(data, case):
    session = Session(case, case.build_stirred(), 2)
    for length in data.draw(splits(case)):
        session.stream(case.tokens(2, length))


@every_system()
def test_rows_in_different_phases_continue_in_parallel(data, case):
    session = Session(case, case.build_stirred(), BATCH)
    for length in data.draw(splits(case)):
        session.stream(case.tokens(BATCH, length), data.draw(masks(BATCH)))
    session.forward(case.tokens(BATCH, data.draw(st.integers(1, case.capacity + 10))))
    session.stream(case.tokens(BATCH, 1))


@every_system()
def test_identity_until_the_memory_is_written(data, case):
    """While the memory is not written the output is plain causal attention with RoPE."""
    cache, length = case.build_stirred(), data.draw(st.integers(0, case.identical))
    if length == 0:
        return
    tokens = case.tokens(2, length)
    q, k = cache.rotate(tokens.q, tokens.k, torch.zeros(2, dtype=torch.long))
    k, v = (z.repeat_interleave(case.num_heads // case.kv_heads, 1) for z in (k, tokens.v))
    plain = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_near(cache(*tokens)[0].detach(), plain, TOLERANCE[case.dtype])
    assert_near(streamed(cache, tokens.split([1] * length)), plain, TOLERANCE[case.dtype])


def streamed(
    cache: HierarchicalCache, parts: list[Tokens], state: CacheState | None = None
) -> Tensor:
    """All outputs of a stream, by default from an empty state."""
    state = cache.init_state(len(parts[0].x)) if state is None else state
    return torch.cat([cache.stream(*part, state) for part in parts], dim=2)


# Rows


@st.composite
def poisoned(draw: st.DrawFn, clean: Tokens) -> tuple[Tokens, int]:
    """The same tokens with NaN or infinities somewhere in one row, and that row."""
    spoilt, row = clean.clone(), draw(st.integers(0, BATCH - 1))
    for name in sorted(draw(st.sets(st.sampled_from(clean._fields), min_size=1))):
        token = getattr(spoilt, name)[row].select(-2, draw(st.integers(0, clean.length - 1)))
        token.fill_(draw(st.sampled_from([math.nan, math.inf, -math.inf])))
    return spoilt, row


def others(row: int) -> list[int]:
    return [i for i in range(BATCH) if i != row]


@every_system()
def test_a_poisoned_row_stays_alone_and_a_reset_heals_it(data, case):
    cache, lengths = case.build_stirred(), data.draw(splits(case, most=15))
    clean = case.tokens(BATCH, sum(lengths))
    spoilt, row = data.draw(poisoned(clean))
    session, state = Session(case, cache, BATCH), cache.init_state(BATCH)
    for good, bad in zip(clean.split(lengths), spoilt.split(lengths), strict=True):
        expected = session.stream(good)
        y = cache.stream(*bad, state)
        assert torch.equal(bits(y[others(row)]), bits(expected[others(row)]))
    # The session goes on with the poisoned state; its oracles know only clean tokens.
    session.state = state
    session.reset([i == row for i in range(BATCH)])
    session.stream(case.tokens(BATCH, 1))
    session.stream(case.tokens(BATCH, case.capacity + 3))
    session.forward(case.tokens(BATCH, 4))


@every_system()
def test_a_poisoned_row_stays_alone_in_the_parallel_form(data, case):
    cache, length = case.build_stirred(), data.draw(st.integers(1, case.capacity + 15))
    clean = case.tokens(BATCH, length)
    spoilt, row = data.draw(poisoned(clean))
    (expected, old), (y, new) = cache(*clean), cache(*spoilt)
    rest = others(row)
    assert torch.equal(bits(y[rest].detach()), bits(expected[rest].detach()))
    for (name, a), (_, b) in zip(old.tensors(), new.tensors(), strict=True):
        assert torch.equal(bits(a[rest].detach()), bits(b[rest].detach())), name


@every_system()
def test_a_reset_erases_the_masked_rows_and_no_other(data, case):
    session = Session(case, case.build_stirred(), BATCH)
    for length in data.draw(splits(case)):
        session.stream(case.tokens(BATCH, length))
    session.reset(data.draw(masks(BATCH)))  # compares the bits
    session.stream(case.tokens(BATCH, 1))
    session.stream(case.tokens(BATCH, case.capacity + 1))


@every_system()
def test_a_masked_row_keeps_every_bit_whatever_it_is_given(data, case):
    cache, lengths = case.build_stirred(), data.draw(splits(case, most=15))
    session = Session(case, cache, BATCH)
    for length in lengths:
        tokens = case.tokens(BATCH, length)
        spoilt, row = data.draw(poisoned(tokens))
        before = session.state.clone()
        other = session.state.clone()
        mask = [i != row for i in range(BATCH)]
        y = session.stream(tokens, mask)
        y_spoilt = cache.stream(*spoilt, other, torch.tensor(mask))
        assert torch.equal(bits(y[others(row)]), bits(y_spoilt[others(row)]))
        states = zip(before.tensors(), session.state.tensors(), other.tensors(), strict=True)
        for (name, old), (_, new), (_, new_spoilt) in states:
            assert torch.equal(bits(old[[row]]), bits(new_spoilt[[row]])), name
            assert torch.equal(bits(new), bits(new_spoilt)), name


# Positions


@every_system(dtype=FLOAT64, turns=[True], most_sinks=0)
def test_outputs_do_not_depend_on_where_positions_start(data, case):
    """Only distances count, and virtual tokens have no position."""
    case = replace(case, config=replace(case.config, sinks=0))
    start = data.draw(st.integers(1, 100_000))
    cache, lengths = case.build_stirred(), data.draw(splits(case))
    tokens, rope = case.tokens(2, sum(lengths)), cache.rope
    parallel, stream = cache(*tokens)[0], streamed(cache, tokens.split(lengths))
    cache.rope = lambda q, k, offset: rope(q, k, offset + start)
    assert_near(cache(*tokens)[0], parallel, 1e-8)
    assert_near(streamed(cache, tokens.split(lengths)), stream, 1e-8)


@every_system(dtype=FLOAT64, turns=[True])
def test_outputs_do_not_depend_on_the_length_of_the_session(data, case):
    """A row with the same window, sinks and memory, but many more tokens behind it."""
    cache = case.build_stirred()
    config, batch = case.config, 2
    # A long session has all its sinks behind its window, so the short one must have them too.
    length = case.capacity + config.sinks + data.draw(st.integers(1, 20))
    _, state = cache(*case.tokens(batch, length))
    cycles = [max(1, size) for size in (case.capacity, config.recent, config.chunk)]
    period = data.draw(st.integers(1, 1000)) * math.lcm(*cycles)
    later = state.detach().clone()
    later.count += period
    keys = later.keys.flatten(1, 2).unsqueeze(2)  # every slot is turned by the same angle
    turned, _ = cache.rotate(keys, keys, torch.full((batch,), period))
    later.keys.copy_(turned.squeeze(2).view_as(later.keys))
    lengths = data.draw(splits(case))
    tokens = case.tokens(batch, sum(lengths))
    assert_near(cache(*tokens, later)[0], cache(*tokens, state)[0], 1e-8)
    parts = tokens.split(lengths)
    assert_near(streamed(cache, parts, later), streamed(cache, parts, state.detach()), 1e-8)


# Gates


def with_gate(cache: HierarchicalCache, case: Case, **gate: object) -> HierarchicalCache:
    """The same memory under another gate."""
    other = replace(case, config=replace(case.config, **gate)).build()
    weights = {n: w for n, w in cache.state_dict().items() if not n.startswith("gate.")}
    other.load_state_dict(weights, strict=False)
    return other


@torch.no_grad()
def halves(cache: HierarchicalCache, case: Case, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """The output, P_recent and P_memory, as soon as the memory is written."""
    parts = [cache] + [with_gate(cache, case, gate="fixed", alpha=a) for a in (1.0, 0.0)]
    y, recent, memory = (part(*tokens)[0][:, :, case.unwritten :] for part in parts)
    return y, recent, memory


def written(case: Case) -> Case:
    """The same with a window and a memory that is read."""
    recent = max(1, int(case.config.recent))
    return replace(case, config=replace(case.config, recent=recent, reset_memory=False))


@given(cases(memory=WITH_MEMORY, gates=MIXING_GATES, dtype=FLOAT64).map(written))
def test_gates_of_two_outputs(case):
    cache = case.build_stirred()
    tokens = case.tokens(2, case.capacity + 12)
    y, recent, memory = halves(cache, case, tokens)
    weights = cache.state_dict()
    if case.config.gate == "residual":
        share = torch.tanh(weights["gate.bias"]).view(1, -1, 1, 1)
        assert_near(y, recent + share * memory, 1e-10)
        return
    if case.config.gate == "fixed":
        alpha = torch.tensor(case.config.alpha, dtype=torch.float64)
    else:
        assert len(weights["gate.bias"]) == (1 if case.config.gate == "layer" else case.num_heads)
        alpha = torch.sigmoid(weights["gate.bias"]).view(1, -1, 1, 1)
    if case.config.gate == "query":
        logit = torch.einsum("bhtd,hd->bht", tokens.q, weights["gate.weight"])
        alpha = torch.sigmoid(logit + weights["gate.bias"].view(1, -1, 1))[..., None]
        alpha = alpha[:, :, case.unwritten :]
    assert_near(y, alpha * recent + (1 - alpha) * memory, 1e-10)


@given(cases(memory=WITH_MEMORY, gates=["joint"], read=["virtual"], dtype=FLOAT64).map(written))
def test_joint_gate_is_one_softmax(case):
    """One softmax over everything, which is also a gate made of the two log-sum-exps."""
    cache = case.build_stirred()
    tokens = case.tokens(1, case.capacity + 6)
    y, recent, memory = halves(cache, case, tokens)
    oracle, bias = Oracle(cache), cache.state_dict()["gate.bias"]
    for t in range(tokens.length):
        oracle.push(*tokens.at(0, t))
        if t < case.unwritten:
            continue
        for head in range(case.num_heads):
            here = (0, head, t - case.unwritten)
            exact, exact_values = oracle.exact_tokens(head, tokens.q[0, head, t])
            scores, values = oracle.virtual_tokens(head, tokens.q[0, head, t])
            both = torch.cat([exact, scores + bias[head]])
            mass = both.exp() / both.exp().sum()
            assert_near(y[here], mass @ torch.cat([exact_values, values]), 1e-10)
            alpha = torch.sigmoid(exact.logsumexp(0) - scores.logsumexp(0) - bias[head])
            assert_near(y[here], alpha * recent[here] + (1 - alpha) * memory[here], 1e-10)


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", ["ttt-mlp", "mean"])
def test_the_inner_update_stays_float32_in_a_narrow_model(memory, dtype):
    config = CacheConfig(
        recent=5, chunk=3, virtual=2, memory=memory, memory_heads=2, memory_dim=4, hidden_dim=6
    )
    case = Case(config, dtype=torch.float32)
    cache = case.build_stirred()
    fast = {name: w.clone() for name, w in cache.state_dict().items() if ".fast." in name}
    assert len(fast) == (3 if memory == "ttt-mlp" else 0)
    cache.half() if dtype == torch.float16 else cache.to(dtype)
    for name, parameter in cache.named_parameters():
        assert parameter.dtype == (torch.float32 if name in fast else dtype), name
    tokens = Tokens(*(z.to(dtype) for z in case.tokens(1, 40)))
    oracle, state = Oracle(cache), cache.init_state(1)
    expected = torch.stack([oracle.push(*tokens.at(0, t)) for t in range(40)], dim=1)
    parallel, after = cache(*tokens)
    for y in (parallel, streamed(cache, tokens.split([1] * 20 + [20]), state)):
        assert y.dtype == dtype
        assert_near(y[0].double(), expected, 0.05)
    for end in (state, after):
        assert end.keys.dtype == dtype
        floating = [t.dtype for t in end.memory.values() if t.is_floating_point()]
        assert set(floating) == {torch.float32}
    cache.to(torch.float32)
    for name, before in fast.items():
        assert torch.equal(cache.state_dict()[name], before), f"{name} went through {dtype}"
