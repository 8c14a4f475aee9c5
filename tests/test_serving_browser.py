"""The page of `ttt-cache serve` in a headless Chromium whose microphone hears a file."""

from __future__ import annotations

import numpy as np
import pytest
from page_support import there
from serving_support import connected, run, served, until

from ttt_cache.serving.errors import RefusedError
from ttt_cache.serving.talk import Talk


@pytest.fixture
def peers(monkeypatch) -> list:
    """The server's ends of all connections, in order."""
    kept, before = [], Talk.run

    async def kept_too(self, peer):
        kept.append(peer)
        return await before(self, peer)

    monkeypatch.setattr(Talk, "run", kept_too)
    return kept


def test_a_conversation(page, models, tmp_path) -> None:
    heard = []

    async def test() -> None:
        async with served(models, 2, tmp_path) as server:
            step = server.engine.step
            server.engine.step = lambda frames: heard.extend(frames.values()) or step(frames)  # type: ignore[method-assign]
            await there(page.open, server.url("/"))
            assert page.status == "Press Talk and speak." and page.text("talk") == "Talk"
            assert not page.find("token").is_displayed() and not page.find("go-on").is_displayed()
            await there(page.talk)
            assert page.text("talk") == "Stop" and server.host.conversations == 1
            assert server.engine.age(0) > 12, "a second and more was sent"
            await there(page.until, lambda: page.level("you") > 20 and page.level("moshi") > 20)
            await there(page.until, lambda: page.text("text").strip())
            size = server.engine.state_bytes() / 2 / 1e6
            assert page.text("memory") == f"{size:.1f} MB"
            assert page.text("time") in ("0:01", "0:02", "0:03", "0:04")
            await there(page.press)
            await there(page.until, lambda: page.text("talk") == "Talk")
            assert page.status == "The conversation has ended."
            await until(lambda: not server.host._seats.here)
            assert 'ended_total{code="1000"} 1.0' in server.host.metrics.text().decode()
            assert page.errors() == []

    run(test())
    assert {frame.shape for frame in heard} == {(1920,)}
    assert np.abs(np.concatenate(heard)).max() > 0.05, "the microphone was heard"


def test_it_goes_on_when_the_connection_breaks(page, models, tmp_path, peers) -> None:
    async def test() -> None:
        async with served(models, 2, tmp_path) as server:
            await there(page.open, server.url("/"))
            await there(page.talk)
            name = page.last["session"]
            (row,) = server.clock.conversations
            age = server.engine.age(row)
            admit = server.host.admit

            async def refuse_once(*asked):
                server.host.admit = admit
                raise RefusedError(409, "twice", "another server has not let go of it yet")

            server.host.admit = refuse_once  # type: ignore[method-assign]
            peers[-1].abort()  # as a network does: code 1006
            await there(page.hear)
            (refusal,) = page.errors()
            assert "409" in refusal
            server.clock.conversations[row].end(1011, "the model has failed")
            await there(page.until, lambda: len(peers) == 3)
            await there(page.hear)
            assert server.engine.age(row) > age and len(peers) == 3
            assert page.last["session"] == name
            assert page.errors() == []

    run(test())


def test_it_goes_on_when_somebody_comes_back(page, models, tmp_path) -> None:
    async def test() -> None:
        async with served(models, 2, tmp_path) as server:
            await there(page.open, server.url("/"))
            await there(page.talk)
            name, (row,) = page.last["session"], server.clock.conversations
            # Another window takes it over: that one has it now.
            async with connected(server.url(f"/api/chat?session={name}")):
                await there(page.until, lambda: page.text("talk") == "Talk")
                assert page.status == "The conversation goes on in another window."
            await until(lambda: not server.host._seats.here)
            age = server.engine.age(row)
            await there(page.open, server.url("/"))  # a new visit
            assert page.text("again").startswith("Go on with the last conversation (0:0")
            await there(page.talk)
            assert page.last["frames"] >= age > 12 and page.last["session"] == name
            await there(page.press)
            await until(lambda: not server.host._seats.here)
            await there(page.find("go-on").click)
            await there(page.talk)
            assert page.last["session"] != name
            assert page.errors() == []

    run(test())


def test_a_server_that_keeps_nothing_and_one_without_that_session(page, models, tmp_path) -> None:
    async def test() -> None:
        async with served(models, 1) as server:
            await there(page.open, server.url("/"))
            await there(page.talk, 0.2)
            server.clock.conversations[0].end(1011, "the model has failed")
            await there(page.until, lambda: page.text("talk") == "Talk")
            assert page.status == "The model has failed. Press Talk to begin a new one."
            assert page.last is None and not page.find("again").is_displayed()
        async with served(models, 1, tmp_path) as server:
            await there(page.open, server.url("/"))
            script = "localStorage.setItem('ttt-cache-last', JSON.stringify(arguments[0]))"
            page.run(script, {"session": "a" * 32, "frames": 900})
            await there(page.open, server.url("/"))
            assert page.text("again") == "Go on with the last conversation (1:12)"
            await there(page.press)
            await there(page.until, lambda: page.status.startswith("The server cannot go on"))
            assert not page.find("go-on").is_selected() and page.last["session"] == "a" * 32
            await there(page.talk, 0.2)
            await there(page.until, lambda: page.last["session"] != "a" * 32)

    run(test())
