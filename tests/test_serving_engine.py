"""Rows that join, leave, wait and are moved: each is answered as if it were alone."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launch_files import FRAME
from moshi.models.lm import LMGen
from serving_support import LENGTH, VOICES, Models, Reply, agree

from ttt_cache.serving.engine import Engine, FullError
from ttt_cache.session_file import read_session, write_session

ROWS = 3


@pytest.fixture(scope="module")
def right(models: Models, heard: list[np.ndarray]) -> list[list[Reply]]:
    return [models.alone(pcm) for pcm in heard]


def test_the_voices_are_answered_differently(right: list[list[Reply]]) -> None:
    said = [tuple(reply[1] for reply in replies if reply) for replies in right]
    assert len(set(said)) == VOICES, "or no mixed rows would be seen"
    assert all(len(set(tokens)) > 3 for tokens in said)


class Talk:
    """One conversation, in whatever row it is."""

    def __init__(self, voice: int, row: int) -> None:
        self.voice, self.row, self.at = voice, row, 0


@given(data=st.data())
@settings(max_examples=12)
def test_each_is_answered_as_if_it_were_alone(data, models, heard, right) -> None:
    engine = models.engine(ROWS)
    talks: list[Talk] = []
    with TemporaryDirectory() as folder:
        for _ in range(data.draw(st.integers(10, 45), label="events")):
            does = data.draw(st.sampled_from(["step"] * 6 + ["join", "join", "leave", "move"]))
            if does == "join" and len(talks) < ROWS:
                talks.append(Talk(data.draw(st.integers(0, VOICES - 1)), engine.join()))
            elif does == "join":
                with pytest.raises(FullError, match="all 3 rows are taken"):
                    engine.join()
            elif does == "leave" and talks:
                engine.leave(talks.pop(data.draw(st.integers(0, len(talks) - 1))).row)
            elif does == "move" and talks:
                move(engine, data.draw(st.sampled_from(talks)), Path(folder, "talk"))
            elif does == "step":
                able = [talk for talk in talks if talk.at < LENGTH]
                some = [talk for talk in able if data.draw(st.booleans())]
                step(engine, some, heard, right)
        assert engine.free == ROWS - len(talks)


def step(engine: Engine, talks: list[Talk], heard, right) -> None:
    frames = {t.row: heard[t.voice][t.at * FRAME :][:FRAME] for t in talks}
    answers = engine.step(frames)
    assert set(answers) == set(frames)
    for talk in talks:
        answer = answers[talk.row]
        said = None if answer is None else (answer.pcm, answer.token)
        agree([said], [right[talk.voice][talk.at]])
        talk.at += 1
        assert engine.age(talk.row) == talk.at


def move(engine: Engine, talk: Talk, file: Path) -> None:
    """Save a conversation, end it, begin another in its row, and go on with it."""
    write_session(file, *engine.session(talk.row))
    engine.leave(talk.row)
    other = engine.join() if engine.free > 1 else None
    talk.row = engine.resume(file, read_session(file))
    if other is not None:
        engine.leave(other)


def test_a_session_is_taken_as_it_is_now(models, heard, right, tmp_path) -> None:
    """It is written while others, and it itself, go on."""
    for rows in (1, 2):
        engine = models.engine(rows)
        talk = Talk(1, engine.join())
        for _ in range(7):
            step(engine, [talk], heard, right)
        taken = engine.session(talk.row)
        for _ in range(3):
            step(engine, [talk], heard, right)
        write_session(tmp_path / "talk", *taken)
        engine.leave(talk.row)
        talk = Talk(1, engine.resume(tmp_path / "talk", read_session(tmp_path / "talk")))
        talk.at = 7
        step(engine, [talk], heard, right)


def test_what_is_refused_frees_its_row(models, tmp_path) -> None:
    engine = models.engine(2)
    tensors, described = engine.session(engine.join())
    with pytest.raises(ValueError, match="holds no Mimi"):
        engine.resume(tmp_path, (tensors, described | {"identity": {}}))
    assert engine.free == 1
    with pytest.raises(ValueError, match="row must be one that is taken, got 1"):
        engine.leave(1)


def test_models_that_cannot_be_served(models) -> None:
    model, mimi = models.single
    for each in models.single:
        each._stop_streaming()
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        Engine(LMGen(model, support_out_of_sync=True), mimi, 0)
    with pytest.raises(ValueError, match="support_out_of_sync=True"):
        Engine(LMGen(model), mimi, 1)
    assert not model.is_streaming and not mimi.is_streaming
