"""The training attention against its reference; `test_kernels_window.py` runs this interpreted.

Rows are in different phases. What no query sees is NaN, and so is every output before a kernel
writes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from kernels_support import assert_accurate
from kernels_window_support import Case, in_dtype, outcome, poison_hidden

from ttt_cache.kernels import window_reference as reference
from ttt_cache.kernels.inputs import GATES, Layer
from ttt_cache.kernels.window import windowed_attention
from ttt_cache.kernels.window_inputs import Seen

SHARE = 2.0
FEW = 16.0  # of a sum that is one number: what plain arithmetic happens to lose of it says little
FEW_QUERIES = {"tokens": 20}
CASES = {
    **{gate: Case(gate=gate, **FEW_QUERIES) for gate in GATES},
    "sinks": Case(sinks=2),
    "repeated": Case(heads=4, kv_heads=2, sinks=5, gate="query", tokens=17, start=(22,)),
    "window": Case(slots=0, tokens=70, start=(5,)),
    "window and sinks": Case(slots=0, sinks=3, heads=2, **FEW_QUERIES),
    "fresh": Case(fresh=True, start=(0, 0), position=True),
    "one token": Case(tokens=1, start=(0, 10, 14, 45_000)),
    "arrived": Case(layer=Layer(5, 4, arrived=True), sinks=2, **FEW_QUERIES),
    "every token": Case(layer=Layer(3, 1), slots=5, **FEW_QUERIES),
    "many slots": Case(slots=37, latent_dim=19, head_dim=48, position=True, tokens=9),
    "many tokens": Case(
        layer=Layer(63, 5), tokens=97, head_dim=64, latent_dim=35, start=(7,), slots=2
    ),
    "many sinks": Case(layer=Layer(40, 3), tokens=70, sinks=37, start=(20,), slots=0),
    "wide": Case(latent_dim=300, head_dim=80, tokens=7, slots=10, start=(13,)),
    "bfloat16": Case(dtype=torch.bfloat16, sinks=2, position=True, **FEW_QUERIES),
    "float16": Case(dtype=torch.float16, gate="query", heads=2, start=(30,), **FEW_QUERIES),
}


@pytest.fixture(autouse=True)
def _nothing_is_written() -> Iterator[None]:
    """Memory that is not written is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", CASES)
def test_one_call(name):
    case = CASES[name]
    torch.manual_seed(len(name) + 6)
    seen, latents = case.seen(), case.latents()
    back = torch.randn(*seen.q.shape[:2], case.tokens, case.head_dim).to(case.dtype)
    exact, plain = (
        outcome(reference.windowed_attention, case.layer, *in_dtype(dtype, seen, latents), back)
        for dtype in (torch.float64, case.dtype)
    )
    poison_hidden(seen, case.layer)
    found = outcome(windowed_attention, case.layer, *in_dtype(None, seen, latents), back)
    assert found.keys() == exact.keys() == plain.keys()
    shares = {}
    for of, actual in found.items():
        assert actual.dtype == plain[of].dtype
        shares[of] = assert_accurate(actual, exact[of], plain[of], SHARE if of != "bias" else FEW)
    print(name, {of: round(share, 2) for of, share in shares.items()})


def test_what_several_programs_share(monkeypatch):
    """Queries of a tile of sinks, and heads that read a tile of latents, dealt to programs."""
    case = Case(heads=3, kv_heads=3, sinks=2, tokens=40, start=(12,))
    torch.manual_seed(0)
    seen, latents = case.seen(), case.latents()
    back = torch.randn(1, 3, case.tokens, case.head_dim)
    whole = outcome(windowed_attention, case.layer, *in_dtype(None, seen, latents), back)
    monkeypatch.setattr("ttt_cache.kernels.window_launch.SPAN", 16)
    monkeypatch.setattr("ttt_cache.kernels.window_launch.PROGRAMS", 1)
    shared = outcome(windowed_attention, case.layer, *in_dtype(None, seen, latents), back)
    for name, one in whole.items():
        torch.testing.assert_close(shared[name], one, rtol=1e-5, atol=1e-5)


def test_what_is_needed():
    """Without gradients, with some, and under autocast with weights of another dtype."""
    case = Case(dtype=torch.bfloat16, gate="query", tokens=5, start=(12,), heads=2)
    torch.manual_seed(0)
    seen, latents = in_dtype(None, case.seen(), case.latents())
    assert latents is not None
    with torch.no_grad():
        plain = windowed_attention(seen, case.layer, latents)
    wide = latents._replace(to_key=latents.to_key.float().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        y = windowed_attention(seen, case.layer, wide)
    assert torch.equal(y, plain) and y.transpose(1, 2).is_contiguous()
    (gradient,) = torch.autograd.grad(y.sum(), wide.to_key)
    assert gradient.dtype == torch.float32 and gradient.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_apart(value):
    """What is no number in one row changes no bit of another, there or on the way back."""
    case = Case(sinks=2, tokens=5, start=(30, 30))
    torch.manual_seed(0)
    seen, latents = case.seen(), case.latents()
    back = torch.randn(2, 1, case.tokens, case.head_dim)
    found = []
    for spoilt in (False, True):
        mine, memory = in_dtype(None, Seen(*(x.clone() for x in seen)), latents)
        if spoilt:
            for x in (*mine[:6], memory.readouts):
                x[0] = value
        made = outcome(windowed_attention, case.layer, mine, memory, back)
        found.append([made[name][1] for name in ("y", *Seen._fields[:6], "readouts")])
    for clean, beside in zip(*found, strict=True):
        assert torch.equal(clean, beside)
