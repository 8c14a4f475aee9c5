"""What the page of `ttt-cache serve` says when something is not as it should be."""

from __future__ import annotations

import time

from page_support import INSECURE, there
from serving_support import connected, run, served, until

TOKEN = "The server wants its token, and this is not it."
# A microphone for which somebody has to be asked first.
ASKED = """navigator.mediaDevices.getUserMedia = async (how) => {
    await new Promise((done) => { window.allow = done; });
    const stream = await window.ask.call(navigator.mediaDevices, how);
    [window.track] = stream.getTracks();
    return stream; };"""


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
            await there(page.talk, 0.2)
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
            await there(page.talk, 0.2)
            page.run("context.suspend()")
            await there(page.until, lambda: page.text("talk") == "Resume")
            await there(page.press)
            await there(page.hear, 0.2)
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


def test_a_server_that_is_too_slow(page, models) -> None:
    async def test() -> None:
        async with served(models, 1) as server:
            step = server.engine.step
            server.engine.step = lambda frames: time.sleep(0.25) or step(frames)  # type: ignore[method-assign]
            await there(page.open, server.url("/"))
            await there(page.press)
            await there(page.until, lambda: page.status.startswith("The sound has gaps"))
            assert page.number("gaps") >= 3 and page.errors() == []

    run(test())
