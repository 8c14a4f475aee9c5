"""The demo: what its story asks, what it counts as right, what it prints and writes."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import ttt_cache
from ttt_cache import testbed
from ttt_cache.cli import main
from ttt_cache.demo.arms import Arm, Arms, make_arms
from ttt_cache.demo.figures import as_json, edges_of, spans
from ttt_cache.demo.story import HELD, LEAST, TALK, Question, Story, write_story
from ttt_cache.demo.table import clock, conversation, recall
from ttt_cache.demo.talk import Talk, hold, threads
from ttt_cache.testbed import vocabulary as v

NAMES = ["window", "stock ring", "full cache", "hierarchical"]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["demo", *map(str, arguments), "--device", "cpu"])


@pytest.mark.parametrize("frames", [LEAST, 1000])
def test_held_facts_are_told_first_and_asked_for_once_at_equal_distances(frames: int) -> None:
    story = write_story(4, frames, seed=1)
    assert story.heard.shape == (4, 2, frames)
    for row in range(4):
        user = story.heard[row, 0].tolist()
        held = [question for question in story.questions if question.held and question.row == row]
        assert {question.key for question in held} == set(range(TALK.keys, v.KEYS))
        for number, question in enumerate(held, start=1):
            told = question.frame - question.age
            assert told < 2 * HELD and user[told - 1] == v.FIRST_KEY + question.key
            assert user[told] - v.FIRST_VALUE == question.answer - v.FIRST_VALUE_TEXT
            assert user[question.frame - 2 : question.frame] == [v.ASK, v.FIRST_KEY + question.key]
            assert user.count(v.FIRST_KEY + question.key) == 2, "told and asked for, nothing else"
            assert 0 <= question.frame - frames * number / HELD + frames / HELD / 4 < frames / HELD


def test_what_moshi_has_said_itself_is_not_asked_for() -> None:
    story = write_story(2, 1000, seed=0)
    asked = set()
    for question in story.questions:
        told = question.frame - question.age
        value = story.heard[question.row, 0, told].item() - v.FIRST_VALUE
        assert value == question.answer - v.FIRST_VALUE_TEXT, "the user's own words"
        asked.add((question.row, question.key, told))
    assert len(asked) == len(story.questions), "each telling is asked for at most once"
    assert v.TURN not in story.heard[:, 0], "Moshi has nothing to say but answers"


def test_stories_follow_their_seed() -> None:
    one, same, other = (write_story(2, LEAST, seed) for seed in (3, 3, 4))
    assert one.heard.equal(same.heard) and one.questions == same.questions
    assert not one.heard.equal(other.heard)


def test_arms_share_their_weights_and_differ_in_what_they_keep() -> None:
    arms = make_arms(300, "cpu")
    assert [arm.name for arm in arms.each] == NAMES
    recent, chunk = arms.config.recent, arms.config.chunk
    assert arms.window == recent + chunk - 1 and arms.context == testbed.load().context
    for arm, context in zip(arms.each[:3], (arms.window, arms.context, 300), strict=True):
        assert {layer.self_attn.context for layer in arm.lm.transformer.layers} == {context}
    states = [arm.lm.state_dict() for arm in arms.each]
    assert all(torch.equal(states[0][name], state[name]) for state in states for name in states[0])


def test_one_step_of_an_arm_is_a_frame_of_every_conversation() -> None:
    story = write_story(2, LEAST, seed=0)
    heard = story.heard[:, :, :60]
    arms = make_arms(60, "cpu").each
    done: list[int] = []
    stock, full = hold(arms[1:3], heard, done.append)
    assert torch.is_grad_enabled()
    assert done == [25, 50, 60]
    for talk in (stock, full):
        assert talk.said.shape == (2, 60) and talk.seconds.shape == (61,)
        assert (talk.seconds > 0).all()
    assert torch.equal(stock.said, full.said), "nothing has left either ring"
    attention = arms[1].lm.transformer.layers[0].self_attn
    ring = 2 * attention.context * attention.embed_dim * 4
    assert stock.state_bytes[0] == stock.state_bytes[-1] == pytest.approx(2 * ring, rel=1e-3)


def made_up() -> tuple[Arms, Story, list[Talk]]:
    """Two arms and three questions of known answers, aged 3, 50 and 90 of 100 frames."""
    config = SimpleNamespace(recent=4, chunk=2)
    each = [Arm("one", "keeps all", None), Arm("other", "keeps none", None)]
    questions = [
        Question(row=0, frame=10, key=0, answer=7, age=3),
        Question(row=1, frame=60, key=9, answer=8, age=50),
        Question(row=0, frame=95, key=10, answer=9, age=90),
    ]
    said = torch.full((2, 100), v.PADDING)
    for question in questions:
        said[question.row, question.frame] = question.answer
    nothing = torch.full((2, 100), v.PADDING)
    seconds = np.r_[np.full(50, 0.001), np.full(51, 0.002)]
    talks = [Talk(said, seconds, [10, 20]), Talk(nothing, 2 * seconds, [5000, 5000])]
    arms = Arms(each, window=5, context=64, config=config)
    return arms, Story(torch.zeros(2, 2, 100), questions), talks


def test_figures_are_those_of_the_talks() -> None:
    arms, story, talks = made_up()
    assert edges_of(arms, 100) == [0, 6, 16, 64, 82, 100]
    result = as_json(arms, story, talks, lambda token: f"<{token}>")
    assert [age["questions"] for age in result["ages"]] == [1, 0, 1, 0, 1]
    assert result["arms"]["one"]["right"] == [1, 0, 1, 0, 1]
    assert result["arms"]["other"]["right"] == [0, 0, 0, 0, 0]
    assert result["first_conversation"] == [
        {
            "fact": v.FACTS[10],
            "told_at_frame": 5,
            "asked_at_frame": 95,
            "right": "<9>",
            "said": {"one": "<9>", "other": "<3>"},
        }
    ]
    assert spans(101) == (slice(20, 40), slice(81, 101))
    one = result["arms"]["one"]
    assert (one["state_bytes_start"], one["state_bytes_end"]) == (10, 20)
    assert (one["step_ms_first"], one["step_ms_last"]) == (1.0, 2.0)
    assert result["minutes"] == pytest.approx(100 * 0.08 / 60)


def test_edges_of_short_conversations() -> None:
    arms, *_ = made_up()
    assert edges_of(arms, 50) == [0, 6, 16, 50]
    assert edges_of(arms, 64) == [0, 6, 16, 64]


def test_clock() -> None:
    assert [clock(frames) for frames in (0, 12, 13, 742, 750, 4500)] == [
        "0:00", "0:01", "0:01", "0:59", "1:00", "6:00",
    ]  # fmt: skip


def shown(table) -> str:
    from rich.console import Console

    console = Console(width=80)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_tables_say_what_the_figures_say() -> None:
    arms, story, talks = made_up()
    result = as_json(arms, story, talks, lambda token: f"w{token}")
    words = shown(conversation(result))
    assert re.search(rf"the {v.FACTS[10]} is w9 +0:07 +w9 ✓ +w3 ✗", words)
    figures = shown(recall(result))
    assert re.search(r"0:00-0:00 in the window +1 +100\.0% +0\.0%", figures)
    assert re.search(r"0:07-0:08 beyond ring +1 +100\.0% +0\.0%", figures)
    assert "0:05-0:07" not in figures, "nothing was asked there"
    assert re.search(r"state at the end \(kB\) +0\.0 +5\.0", figures)
    assert re.search(r"step at the end \(ms\) +2\.00 +4\.00", figures)


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, str, dict]:
    out = tmp_path_factory.mktemp("demo") / "a" / "b"
    with threads(2):
        result = call("--frames", LEAST, "--seed", 3, "--out", out, "--threads", 1)
    assert result.exit_code == 0, result.output
    return out, result.stdout, json.loads((out / "demo.json").read_text())


def test_the_demo_from_the_command_line(ran) -> None:
    out, printed, found = ran
    assert sorted(path.name for path in out.iterdir()) == ["demo.json", "demo.png"]
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert found["device"].startswith("cpu (") and found["threads"] == 1
    assert found["frames"] == LEAST and found["seed"] == 3 and list(found["arms"]) == NAMES
    adapter = ttt_cache.load_adapter(testbed.load(), testbed.adapter("hierarchical"))
    assert found["settings"]["recent"] == adapter.config.recent
    for question in found["first_conversation"]:
        assert f"the {question['fact']} is {question['right']}" in printed
        assert question["right"] in v.NAMES
    assert len(found["first_conversation"]) == HELD
    for arm in found["arms"].values():
        assert arm["state_bytes_start"] == arm["state_bytes_end"]
        assert f"{arm['state_bytes_end'] / 1000:,.1f}" in printed
    assert "within the context of 1024" in printed.replace("\n", " ")
    assert max(map(len, printed.splitlines()[:-2])) <= 80  # but for paths, which are not wrapped


def test_the_demo_shows_that_the_memory_recalls_what_the_window_has_not(ran) -> None:
    *_, found = ran
    beyond = [n for n, age in enumerate(found["ages"]) if age["from"] > found["window"]]
    asked = sum(found["ages"][n]["questions"] for n in beyond)
    share = {
        name: sum(arm["right"][n] for n in beyond) / asked for name, arm in found["arms"].items()
    }
    assert asked >= 64
    assert share["full cache"] == share["stock ring"] > 0.9
    assert share["window"] < 0.3
    assert share["hierarchical"] > 0.9 * share["full cache"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--frames", "255"], "--frames must be at least 256, got 255"),
        (["--frames", "99999999999"], "--frames must be at most 100000, got 99999999999"),
        (["--frames", "many"], "'--frames': must be a whole number, got 'many'"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--threads", "9999"], f"--threads must be at most {os.cpu_count()}, got 9999"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--seed", str(2**32)], "--seed must be at most 4294967295, got 4294967296"),
        (["--out", "file"], "--out must be a folder, got file"),
    ],
)
def test_the_demo_refuses(arguments, says, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "file").touch()
    refused(call(*arguments), says, tmp_path)


def test_the_demo_refuses_a_device_that_is_not_there(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    result = CliRunner().invoke(main, ["demo", "--device", "abacus"])
    refused(result, "--device must be one of cpu", tmp_path)


def refused(result: Result, says: str, folder: Path) -> None:
    assert result.exit_code == 2
    assert says in re.sub(r"\x1b\[[0-9;]*m", "", result.stderr)
    assert "Traceback" not in result.stderr and result.stdout == ""
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_an_interrupted_demo_says_so(tmp_path: Path, monkeypatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ttt_cache.demo.run.hold", interrupt)
    result = call("--out", tmp_path)
    assert result.exit_code == 130 and "interrupted" in result.stderr
    assert list(tmp_path.iterdir()) == []
