"""The step as it is captured: every row computed, nothing in Python that depends on data."""

from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch
from hypothesis import strategies as st
from strategies import every_system, masks
from support import Case, Session, Tokens

from ttt_cache import CacheConfig, rows
from ttt_cache import recent as ring
from ttt_cache.presets import PRESETS

BATCH = 3


@every_system()
def test_rows_that_are_computed_and_masked_away(data, case):
    """What the CPU leaves out gives the same where it is not left out."""
    with ExitStack() as stack:
        for module in (rows, ring):
            stack.enter_context(patch.object(module, "captured", return_value=True))
        session = Session(case, case.build_stirred(), BATCH)
        for _ in range(data.draw(st.integers(1, case.capacity + 10))):
            session.stream(case.tokens(BATCH, 1), data.draw(st.none() | masks(BATCH)))
        if any(idle := data.draw(masks(BATCH))):
            session.reset(idle)
        session.stream(case.tokens(BATCH, 1))


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_in_a_step_asks_what_the_data_are(preset):
    """On tensors that hold none: whoever looks at them fails."""
    recent = PRESETS[preset].settings.get("recent", 20)
    recent = 20 if recent is None else recent  # all that a layer of a model has
    case = Case(CacheConfig(preset=preset, recent=recent), dtype=torch.float32)
    cache = case.build().to("meta")
    tokens = Tokens(*(z.to("meta") for z in case.tokens(BATCH, 1)))
    mask = torch.ones(BATCH, dtype=torch.bool, device="meta")
    y = cache.stream(*tokens, cache.init_state(BATCH), mask)
    assert y.shape == tokens.q.shape
