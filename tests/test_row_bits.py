"""What a row learns has the same bits whoever learns beside it, and wherever it stands."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ttt_cache.memory import TTT
from ttt_cache.memory.tokens import LatentTokens

ROWS = 8


def memory_of(hidden: list[int]) -> TTT:
    torch.manual_seed(0)
    return TTT(24, "hidden", 4, 16, hidden, chunk=4, slots=5, publishes=True)


@given(
    st.sampled_from([[], [32], [32, 16]]),
    st.lists(st.sets(st.integers(0, ROWS - 1), min_size=1), min_size=8, max_size=8),
)
def test_who_learns_beside_it_changes_nothing(hidden: list[int], learning: list[set[int]]) -> None:
    memory, made = memory_of(hidden), torch.Generator().manual_seed(len(learning[0]))
    with torch.no_grad():
        together = {name: part.clone() for name, part in memory.initial(ROWS).items()}
        for number, rows in enumerate(learning):
            tokens = torch.randn(ROWS, memory.width, generator=made)
            some = sorted(rows)
            part = {name: each[some] for name, each in together.items()}
            for state, given_to in ((part, tokens[some]), (together, tokens)):
                memory.take(state, given_to)
                if number % 4 == 3:
                    memory.close(state)
            for name, each in together.items():
                assert torch.equal(part[name], each[some]), name
            assert torch.equal(memory.read(part, len(some)), memory.read(together, ROWS)[some])


@given(st.permutations(range(ROWS)), st.integers(1, 12), st.integers(1, 2))
def test_where_it_stands_changes_nothing(order: list[int], slots: int, repeat: int) -> None:
    """Of queries against virtual tokens, whose keys by slot have any number of columns."""
    torch.manual_seed(slots)
    reader = LatentTokens(slots, 64, 2 * repeat, 2, 32, "none")
    with torch.no_grad():
        reader.slot_key.normal_()
        q, readout = torch.randn(ROWS, 2, repeat, 1, 1, 32), torch.randn(ROWS, 1, 1, slots, 64)
        scores = reader.score(q, readout)
        assert torch.equal(reader.score(q[order], readout[order]), scores[order])
