"""One conversation of a batch: into any row of any batch, forked, and nobody else is disturbed."""

from __future__ import annotations

import functools
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from session_support import (
    Said,
    conditioned,
    frames,
    moshi,
    remembered,
    same,
    say,
    talk,
    without_waiting_for_the_disk,  # noqa: F401
)

import ttt_cache

LENGTH, TALKS = 50, 4
SETTINGS = {"layers": [0], "sinks": 1}  # beside a stock layer


@functools.cache
def model(copy: int):
    """Two of them, since a model streams one batch at a time; `copy` 0 says what is right."""
    return moshi(SETTINGS, num_layers=2)


@functools.cache
def alone() -> list[Said]:
    """What each conversation is answered when nothing interrupts it."""
    return [said_alone(model(0), codes()[k : k + 1]) for k in range(TALKS)]


def codes() -> torch.Tensor:
    return frames(model(0), LENGTH, TALKS)


def said_alone(lm, heard, **options) -> Said:
    gen = talk(lm, 1, use_sampling=False, support_out_of_sync=True, **options)
    return say(gen, heard)


class Batch:
    """Conversations side by side at paces of their own; every answer is compared."""

    def __init__(self, copy: int, talks: list[int], seed: int) -> None:
        self.gen = talk(model(copy), len(talks), use_sampling=False, support_out_of_sync=True)
        self.talks, self.at = list(talks), [0] * len(talks)
        self.chance = torch.Generator().manual_seed(seed)

    def go_on(self, steps: int) -> None:
        rows = range(len(self.talks))
        for _ in range(steps):
            active = torch.rand(len(rows), generator=self.chance) < 0.7
            active &= torch.tensor(self.at) < LENGTH
            places = [min(at, LENGTH - 1) for at in self.at]
            heard = torch.stack([codes()[self.talks[r], :, places[r]] for r in rows])[..., None]
            self.gen.set_exec_mask(active)
            said = self.gen.step(heard)
            for row in active.nonzero().flatten().tolist():
                expected = alone()[self.talks[row]][self.at[row]]
                assert torch.equal(said[row : row + 1], expected), (row, self.at[row])
                self.at[row] += 1

    def save(self, file: Path, row: int) -> tuple[int, int]:
        ttt_cache.save_session(self.gen, file, row=row)
        return self.talks[row], self.at[row]

    def load(self, file: Path, rows: list[int], saved: tuple[int, int]) -> None:
        ttt_cache.load_session(self.gen, file, row=rows)
        for row in rows:
            self.talks[row], self.at[row] = saved


@given(data=st.data())
def test_any_row_into_any_rows_of_another_batch_at_any_time(data):
    batches = []
    for copy in (1, 2):
        talks = data.draw(st.lists(st.integers(0, TALKS - 1), min_size=1, max_size=4))
        batches.append(Batch(copy, talks, seed=data.draw(st.integers(0, 99))))
        batches[-1].go_on(data.draw(st.integers(0, 25), label="steps"))
    with TemporaryDirectory() as folder:
        for _ in range(data.draw(st.integers(1, 2), label="moves")):
            source, target = data.draw(st.permutations(batches))
            row = data.draw(st.integers(0, len(source.talks) - 1), label="from")
            places = st.integers(0, len(target.talks) - 1)
            rows = data.draw(st.lists(places, min_size=1, unique=True), label="to")
            saved = source.save(Path(folder, "talk"), row)
            others = [r for r in range(len(target.talks)) if r not in rows]
            kept = files_of(target, others, Path(folder))
            drawn = torch.get_rng_state()
            target.load(Path(folder, "talk"), rows, saved)
            assert torch.equal(torch.get_rng_state(), drawn)
            assert files_of(target, others, Path(folder)) == kept
            assert set(files_of(target, rows, Path(folder))) == {Path(folder, "talk").read_bytes()}
            for batch in batches:
                batch.go_on(data.draw(st.integers(0, 10), label="steps"))


def files_of(batch: Batch, rows: list[int], folder: Path) -> list[bytes]:
    paths = (ttt_cache.save_session(batch.gen, folder / "other", row=row) for row in rows)
    return [path.read_bytes() for path in paths]


def test_a_whole_batch_into_rows_of_a_larger_one(tmp_path):
    two = talk(model(1), 2, use_sampling=False)
    say(two, codes()[:2, :, :20])
    ttt_cache.save_session(two, tmp_path / "two")
    expected = torch.cat([cat(alone()[k][20:]) for k in (2, 1, 3, 0)])
    four = talk(model(1), 4, use_sampling=False, support_out_of_sync=True)
    heard = codes()[[2, 1, 3, 0]]
    say(four, heard[:, :, :20])
    state = remembered(four)["generator"]
    ttt_cache.load_session(four, tmp_path / "two", row=(3, 1))
    assert remembered(four)["generator"] == state
    assert torch.equal(cat(say(four, heard[:, :, 20:])), expected)


@pytest.mark.parametrize("where", ["sum", "cross"])
def test_guided_rows_bring_their_conditions_along(where, tmp_path):
    """Row i of a guided batch is rows i and i + B of the language model."""
    lm, told = conditioned(where, ["calm", "glad", "calm", "calm"])
    heard = frames(lm, 40, 2)
    options = {"use_sampling": False, "cfg_coef": 2.0, "support_out_of_sync": True}
    two = talk(lm, 2, condition_tensors=told, **options)
    say(two, heard[:, :, :20])
    ttt_cache.save_session(two, tmp_path / "glad", row=1)
    expected = cat(say(two, heard[:, :, 20:]))[1]
    brought = getattr(two._streaming_state, f"condition_{where}")[[1, 3]]
    lm, told = conditioned(where, ["calm"] * 6)
    three = talk(lm, 3, condition_tensors=told, **options)
    mixed = torch.stack([heard[1], heard[0], heard[1]])
    before = say(three, mixed[:, :, :20])
    ttt_cache.load_session(three, tmp_path / "glad", row=[0, 2])
    there = getattr(three._streaming_state, f"condition_{where}")
    assert torch.equal(there[[0, 3]], brought)
    assert torch.equal(there[[2, 5]], brought)
    said = cat(say(three, mixed[:, :, 20:]))
    assert torch.equal(said[0], expected)
    assert torch.equal(said[2], expected)
    _, told = conditioned(where, ["calm"] * 2)
    calm = said_alone(lm, heard[:1], cfg_coef=2.0, condition_tensors=told)
    assert torch.equal(torch.cat([cat(before)[1:2], said[1:2]], dim=2), cat(calm))


def cat(said: Said) -> torch.Tensor:
    return torch.cat(said, dim=2)


def test_rows_that_share_a_condition(tmp_path):
    """One condition for the whole batch: a row may leave it, and only one that has it may join."""
    lm, glad = conditioned("sum", ["glad"])
    _, calm = conditioned("sum", ["calm"])
    heard = frames(lm, 30, 2)
    files = {}
    for name, told in (("glad", glad), ("calm", calm)):
        gen = talk(lm, 2, condition_tensors=told)
        say(gen, heard[:, :, :10])
        files[name] = ttt_cache.save_session(gen, tmp_path / name, row=1)
        files[f"both {name}"] = ttt_cache.save_session(gen, tmp_path / f"both {name}")
    gen = talk(lm, 2, condition_tensors=glad)
    say(gen, heard[:, :, 10:20])
    ttt_cache.load_session(gen, files["glad"], row=0)
    before = remembered(gen)
    with pytest.raises(ValueError, match=r"gen\.condition_sum is one for all 2 rows of gen"):
        ttt_cache.load_session(gen, files["calm"], row=0)
    assert remembered(gen) == before
    mixed, told = conditioned("sum", ["calm", "glad"])
    path = ttt_cache.save_session(talk(mixed, 2, condition_tensors=told), tmp_path / "mixed")
    before = remembered(gen)
    with pytest.raises(ValueError, match="these conversations have another"):
        ttt_cache.load_session(gen, path)
    assert remembered(gen) == before
    ttt_cache.load_session(gen, files["both calm"])
    assert torch.equal(gen._streaming_state.condition_sum, calm["mood"].condition)


def in_sync(batch: int):
    """A batch that returns `None` as long as it is too young, as Moshi's programs use it."""
    return talk(model(1), batch, use_sampling=False)


def test_ages_where_rows_are_kept_in_sync(tmp_path):
    """Without `support_out_of_sync` nothing is returned until the youngest row has something."""
    gen = in_sync(2)
    say(gen, codes()[:2, :, :1])
    ttt_cache.save_session(gen, tmp_path / "young", row=1)
    say(gen, codes()[:2, :, 1:20])
    ttt_cache.save_session(gen, tmp_path / "old", row=0)
    gen = in_sync(3)
    ttt_cache.load_session(gen, tmp_path / "old", row=range(3))  # all of one age: no delay
    expected = cat(alone()[0][20:])
    assert torch.equal(cat(say(gen, codes()[[0, 0, 0], :, 20:]))[2:], expected)
    gen = in_sync(2)  # beside a row that has just begun: as if that had been reset
    ttt_cache.load_session(gen, tmp_path / "old", row=1)
    said = say(gen, torch.stack([codes()[2, :, : LENGTH - 20], codes()[0, :, 20:]]))
    assert [tokens is None for tokens in said[:3]] == [True, False, False]
    assert torch.equal(cat(said[1:])[1:], expected[:, :, 1:])
    assert torch.equal(cat(said[1:])[:1], cat(alone()[2][1 : LENGTH - 20]))
    ttt_cache.load_session(gen, tmp_path / "young", row=0)  # the other way round
    assert gen.step(codes()[:2, :, 1:2]) is not None


def test_a_file_of_one_conversation_into_a_batch_of_one(tmp_path):
    """All but the generators, which it has none of."""
    gen = in_sync(3)
    heard = codes()
    say(gen, heard[:3, :, :20])
    ttt_cache.save_session(gen, tmp_path / "one", row=2)
    gen = in_sync(1)
    torch.manual_seed(7)
    drawn = torch.get_rng_state()
    ttt_cache.load_session(gen, tmp_path / "one")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(cat(say(gen, heard[2:3, :, 20:])), cat(alone()[2][20:]))
    ttt_cache.save_session(gen, tmp_path / "whole")
    saved = remembered(gen)
    torch.manual_seed(8)
    ttt_cache.load_session(gen, tmp_path / "whole", row=0)
    assert remembered(gen)["generator"] != saved["generator"]
    ttt_cache.load_session(gen, tmp_path / "whole")
    assert remembered(gen) == saved


def test_two_rows_in_one_are_the_same_conversation(tmp_path):
    """Forked, then told different things."""
    gen = in_sync(2)
    heard = codes()
    say(gen, heard[:2, :, :20])
    ttt_cache.save_session(gen, tmp_path / "talk", row=0)
    ttt_cache.load_session(gen, tmp_path / "talk", row=[0, 1])
    end = say(gen, torch.stack([heard[0, :, 20:], heard[3, :, 20:]]))
    assert torch.equal(cat(end)[:1], cat(alone()[0][20:]))
    assert not same(end, [tokens[[0, 0]] for tokens in end if tokens is not None])
