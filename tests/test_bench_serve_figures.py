"""The figures of `ttt-cache bench serve`: matching, percentiles, histograms, ramp, sound."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_support import decoded

from ttt_cache.bench.serve import server
from ttt_cache.bench.serve.client import Heard
from ttt_cache.bench.serve.figures import Level, figures, percentile
from ttt_cache.bench.serve.match import latencies
from ttt_cache.bench.serve.plan import make_plan
from ttt_cache.bench.serve.ramp import FINE, following, levels, most_held
from ttt_cache.bench.serve.sound import FRAME, RATE, messages, voice
from ttt_cache.serving.codec import CODECS
from ttt_cache.serving.metrics import Metrics

spans = st.lists(st.floats(0, 3), min_size=1, max_size=40)


def conversation(holds: list[float], delay: int, together: int) -> tuple[np.ndarray, np.ndarray]:
    """When frames were due and when their answers came, from a server that answers in order."""
    due = 5 + 0.08 * np.arange(delay + len(holds))
    done, free = [], 0.0
    for moment, hold in zip(due[delay:], holds, strict=True):
        free = max(free, moment) + hold
        done.append(free)
    groups = [done[start : start + together] for start in range(0, len(done), together)]
    return due, np.array([group[-1] for group in groups for _ in group])


@given(spans, st.integers(0, 5), st.integers(1, 4), st.integers(0, 10))
def test_each_answer_is_matched_to_its_frame(holds, delay, together, lost) -> None:
    """However late, grouped or cut off; what did not come has taken for ever."""
    due, arrived = conversation(holds, delay, together)
    arrived = arrived[: max(len(arrived) - lost, 0)]
    waited = latencies(due, arrived, delay)
    assert len(waited) == len(holds)
    for number, value in enumerate(waited):
        if number < len(arrived):
            assert value == arrived[number] - due[delay + number]
        else:
            assert math.isinf(value)


@given(spans, st.integers(0, 3), st.integers(0, 39))
def test_a_frame_that_is_left_out_makes_nothing_look_faster(holds, delay, at) -> None:
    due, arrived = conversation(holds, delay, 1)
    right = latencies(due, arrived, delay)
    waited = latencies(due, np.delete(arrived, at % len(holds)), delay)
    assert (waited >= right).all() and np.isinf(waited).sum() == 1


def test_answers_that_belong_to_no_frame_are_refused() -> None:
    due = 0.08 * np.arange(4)
    with pytest.raises(ValueError, match=r"came 0\.030 s before"):
        latencies(due, np.array([0.2, 0.13]), 1)
    with pytest.raises(ValueError, match="5 frames were answered, but 4 sent"):
        latencies(due, np.full(4, 9.0), 1)


@given(
    st.lists(st.floats(0, 9) | st.just(math.inf), min_size=1), st.sampled_from([50, 95, 99, 100])
)
def test_a_percentile_is_the_smallest_that_suffices(values, percent) -> None:
    ordered = np.sort(values)
    found = percentile(ordered, percent)
    assert found in values
    assert (ordered <= found).mean() * 100 >= percent
    assert (ordered < found).mean() * 100 < percent


def heard(*waited: float, behind: float = 0.0, ended: str | None = None) -> Heard:
    return Heard(np.array(waited), np.full(len(waited), behind), ended)


def test_what_is_held_in_real_time() -> None:
    fast = heard(*[0.04] * 99)
    assert figures(2, [fast, fast]).held
    late = figures(2, [fast, heard(0.5, 0.5)])
    assert not late.held and late.late_share == 2 / 101 and late.p99_ms == late.max_ms == 500
    assert figures(2, [fast, heard(0.5)]).held  # one in a hundred
    lost = figures(2, [fast, heard(math.inf)])
    assert not lost.held and lost.lost == 1 and lost.as_json()["max_ms"] is None
    broken = figures(2, [fast, heard(ended="closed"), heard(ended="closed")])
    assert not broken.held and broken.broken == 2 and broken.reasons == ("2 x closed",)
    slow = figures(1, [heard(*[0.04] * 99, behind=0.03)])
    assert slow.held is None and not slow.on_schedule and slow.behind_p99_ms == 30
    assert not Level(1, refused=1).held


@given(st.lists(st.floats(0.001, 3), min_size=1, max_size=50), st.floats(0.01, 0.99))
def test_the_servers_steps_are_read_from_its_histogram(steps, quantile) -> None:
    """As exactly as its buckets are: the quantile lies in the bucket of the step that it is."""
    metrics = Metrics(2, 10)
    metrics.stepped(1, 1, 0.3)  # before the first look
    before = seen(metrics)
    for seconds in steps:
        metrics.stepped(1, 1, seconds)
    after = seen(metrics)
    assert (after.frames - before.frames, after.rows, after.state_bytes) == (len(steps), 2, 10)
    exact = sorted(steps)[math.ceil(quantile * len(steps)) - 1]
    edges = [0.0, *sorted(after.buckets)]
    high = next(number for number, edge in enumerate(edges) if exact <= edge)
    found = server.step_quantile(before, after, quantile)
    assert found is not None
    if math.isinf(edges[high]):
        assert math.isinf(found)
    else:
        assert edges[high - 1] <= found <= edges[high] * (1 + 1e-9)
    assert server.step_quantile(after, after, quantile) is None


def seen(metrics: Metrics) -> server.Seen:
    return server.seen_in(metrics.text().decode())


@given(st.integers(0, 3000))
def test_the_ramp_ends_at_what_a_server_holds(capacity: int) -> None:
    held: dict[int, bool] = {}
    while (number := following(held)) is not None:
        assert number not in held and len(held) < 30
        held[number] = number <= capacity
    found = most_held(held)
    assert found <= capacity <= found + max(found // FINE, 1)


def test_a_level_above_one_that_was_not_held_does_not_count() -> None:
    assert most_held({1: True, 2: True, 4: False, 8: True}) == 2
    assert most_held({1: False}) == most_held({}) == 0
    assert list(levels((4, 2), [])) == [4, 2]


@pytest.mark.parametrize("codec", CODECS)
def test_what_clients_say(codec: str) -> None:
    """A message for each frame, loud enough to be heard, and the same for the same seed."""
    said = asyncio.run(messages(codec, 20, 3))
    coder = CODECS[codec](RATE, FRAME)
    frames = [decoded(coder, message[1:]) for message in said]
    assert [len(each) for each in frames] == [1] * 20 and {message[0] for message in said} == {1}
    loud = np.sqrt(np.mean(np.square(np.concatenate([each[0] for each in frames]))))
    assert 0.02 < loud < 0.5
    assert said == asyncio.run(messages(codec, 20, 3)) != asyncio.run(messages(codec, 20, 4))
    assert len(voice(7, 0)) == 7 * FRAME


@pytest.mark.parametrize(
    ("url", "chat"),
    [
        ("ws://host:8998", "ws://host:8998/api/chat"),
        ("http://host/moshi/", "ws://host/moshi/api/chat"),
        ("https://host:1/api/chat", "wss://host:1/api/chat"),
        ("wss://[::1]:2", "wss://[::1]:2/api/chat"),
        ("ws://me:s3cret@host:3", "ws://host:3/api/chat"),
    ],
)
def test_addresses(url: str, chat: str) -> None:
    plan = make_plan(url)
    assert plan.chat == chat
    assert make_plan(url, codec="pcm").chat == chat + "?codec=pcm"
    assert plan.page("/health") == "http" + chat.removeprefix("ws").replace("api/chat", "health")
    assert (plan.token == "s3cret") is ("s3cret" in url)
    assert "s3cret" not in plan.command + str(plan.settings)


def test_the_command_of_a_plan_makes_that_plan() -> None:
    plan = make_plan("ws://h:1", clients=[3, 1], seconds=2.5, warm_up=0.5, codec="pcm", seed=7)
    words = plan.command.split()[3:]
    given_, clients = dict(zip(words[::2], words[1::2], strict=True)), words.count("--clients")
    assert clients == 2 and given_["--seconds"] == "2.5" and given_["--seed"] == "7"
    assert plan.clients == (1, 3) and plan.warm_up_frames == 6 and plan.frames == 37
