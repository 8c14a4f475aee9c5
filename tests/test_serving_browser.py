"""The page of `ttt-cache serve` in a headless Chromium whose microphone hears a file."""

from __future__ import annotations

import numpy as np
import pytest
from page_support import INSECURE, Page, there
from serving_support import connected, run, served, until

from ttt_cache.serving.talk import Talk

LAST = "return JSON.parse(localStorage.getItem('ttt-cache-last'))"
TOKEN = "The server wants its token, and this is not it."

# A microphone for which somebody has to be asked first.
ASKED = """navigator.mediaDevices.getUserMedia = async (how) => {
    await new Promise((done) => { window.allow = done; });
    const stream = await window.ask.call(navigator.mediaDevices, how);
    [window.track] = stream.getTracks();
    return stream; };"""


@pytest.fixture
def peers(monkeypatch) -> list:
    """The server's ends of all connections, in order."""
    kept, before = [], Talk.run

    async def kept_too(self, peer):
        kept.append(peer)
        return await before(self, peer)

    monkeypatch.setattr(Talk, "run", kept_too)
    return kept


def talk(page: Page, seconds: float = 1) -> None:
    """Press Talk, and hear so much of the answer."""
    page.press()
    hear(page, seconds)


def hear(page: Page, seconds: float = 1) -> None:
    before = page.number("played")
    page.until(lambda: page.state == "talking" and page.number("played") > before + seconds)


def test_a_conversation(page, models, tmp_path) -> None:
    heard = []

    async def test() -> None:
        async with served(models, 2, tmp_path) as server:
            step = server.engine.step
            server.engine.step = lambda frames: heard.extend(frames.values()) or step(frames)  # type: ignore[method-assign]
            await there(page.open, server.url("/"))
            assert page.status == "Press Talk and speak." and page.text("talk") == "Talk"
            assert not page.find("token").is_displayed() and not page.find("go-on").is_displayed()
            await there(talk, page)
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
            await until(lambda: not server.host.conversations)
            assert 'ended_total{code="1000"} 1.0' in server.host.metrics.text().decode()
            assert page.errors() == []

    run(test())
    assert {frame.shape for frame in heard} == {(1920,)}
    assert np.abs(np.concatenate(heard)).max() > 0.05, "the microphone was heard"


def test_it_goes_on_when_the_connection_breaks_and_when_somebody_comes_back(
    page, models, tmp_path, peers
) -> None:
    async def test() -> None:
        async with served(models, 2, tmp_path) as server:
            await there(page.open, server.url("/"))
            await there(talk, page)
            name = page.run(LAST)["session"]
            (row,) = server.clock.conversations
            age = server.engine.age(row)
            peers[-1].abort()  # as a network does: code 1006
            await there(hear, page)
            server.clock.conversations[row].end(1011, "the model has failed")
            await there(page.until, lambda: len(peers) == 3)
            await there(hear, page)
            assert server.engine.age(row) > age and len(peers) == 3
            assert page.run(LAST)["session"] == name
            said = page.text("text")
            assert said and page.errors() == []

            # Another window takes it over: that one has it now.
            async with connected(server.url(f"/api/chat?session={name}")):
                await there(page.until, lambda: page.text("talk") == "Talk")
                assert page.status == "The conversation goes on in another window."
            await until(lambda: not server.host.conversations)

            await there(page.open, server.url("/"))  # a new visit
            assert page.text("again").startswith("Go on with the last conversation (0:0")
            await there(talk, page)
            assert server.engine.age(row) > age and page.run(LAST)["session"] == name
            assert page.run(LAST)["frames"] > age
            await there(page.press)
            await until(lambda: not server.host.conversations)
            await there(page.find("go-on").click)
            await there(talk, page)
            assert page.run(LAST)["session"] != name
            assert page.errors() == []

    run(test())


def test_a_server_that_keeps_nothing_and_one_without_that_session(page, models, tmp_path) -> None:
    async def test() -> None:
        async with served(models, 1) as server:
            await there(page.open, server.url("/"))
            await there(talk, page, 0.2)
            server.clock.conversations[0].end(1011, "the model has failed")
            await there(page.until, lambda: page.text("talk") == "Talk")
            assert page.status == "The model has failed. Press Talk to begin a new one."
            assert page.run(LAST) is None and not page.find("again").is_displayed()
        async with served(models, 1, tmp_path) as server:
            await there(page.open, server.url("/"))
            script = "localStorage.setItem('ttt-cache-last', JSON.stringify(arguments[0]))"
            page.run(script, {"session": "a" * 32, "frames": 900})
            await there(page.open, server.url("/"))
            assert page.text("again") == "Go on with the last conversation (1:12)"
            await there(page.press)
            await there(page.until, lambda: page.status.startswith("The server no longer has"))
            assert not page.find("again").is_displayed() and page.run(LAST) is None
            await there(talk, page, 0.2)

    run(test())


def test_a_full_server_and_a_token(page, models) -> None:
    async def test() -> None:
        async with served(models, 1, token="s3cret") as server:
            await there(page.open, server.url("/"))
            await there(page.find("token").send_keys, "wröng")
            await there(page.press)
            await there(page.until, lambda: page.status == TOKEN)
            token = page.find("token")
            assert token.get_attribute("aria-invalid") == "true" and page.text("talk") == "Talk"
            assert page.run("return document.activeElement.id") == "token"
            async with connected(server.url("/api/chat?token=s3cret")):
                await there(token.send_keys, "s3cret\n")  # in place of what is marked
                await there(page.until, lambda: page.status.startswith("All conversations are"))
            await until(lambda: server.engine.free == 1)
            await there(talk, page, 0.2)
            kept = page.run("return [Object.values(localStorage), Object.values(sessionStorage)]")
            assert kept == [[], ["s3cret"]]

    run(test())


def test_sound_that_stops(page, models) -> None:
    """As when a phone locks: a tap goes on; if it comes too late, the server has ended it."""
    patched = """{ const Before = AudioContext; window.AudioContext = class extends Before {
        constructor(...how) { super(...how); window.context = this; } } }"""
    command = "Page.addScriptToEvaluateOnNewDocument"
    added = page.driver.execute_cdp_cmd(command, {"source": patched})

    async def test() -> None:
        async with served(models, 1, idle=2) as server:
            await there(page.open, server.url("/"))
            await there(talk, page, 0.2)
            page.run("context.suspend()")
            await there(page.until, lambda: page.text("talk") == "Resume")
            await there(page.press)
            await there(hear, page, 0.2)
            page.run("context.suspend()")
            await there(page.until, lambda: "no sound came for too long" in page.status)
            assert page.text("talk") == "Talk" and page.errors() == []

    try:
        run(test())
    finally:
        page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def test_no_microphone_no_https_no_server(page, models) -> None:
    async def test() -> None:
        async with served(models, 1) as server:
            await there(page.open, f"http://{INSECURE}:{server.port}/")
            assert "--ssl" in page.status and not page.find("talk").is_enabled()
            await there(page.open, server.url("/"))
            for error, said in (
                ("NotAllowedError", "is not allowed"),
                ("NotFoundError", "There is no microphone"),
                ("NotReadableError", "Another program"),
                ("Strange", "cannot be used: why"),
            ):
                page.run(
                    "window.ask ??= navigator.mediaDevices.getUserMedia;"
                    "navigator.mediaDevices.getUserMedia = () => "
                    "Promise.reject(new DOMException('why', arguments[0]))",
                    error,
                )
                await there(page.press)
                await there(page.until, lambda said=said: said in page.status)
                assert page.text("talk") == "Talk" and server.engine.free == 1
            page.run(ASKED)
            await there(page.press)
            await there(page.until, lambda: page.status == "Waiting for the microphone …")
            await there(page.press)  # somebody who changes their mind
            page.run("allow()")
            await there(page.until, lambda: page.run("return window.track?.readyState === 'ended'"))
            assert page.text("talk") == "Talk" and page.errors() == []
            await there(page.open, server.url("/"))
        await there(page.press)
        await there(page.until, lambda: page.status.startswith("The server does not answer"))

    run(test())
