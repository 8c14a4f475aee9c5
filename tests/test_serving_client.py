"""`moshi.client` itself, unchanged, talks to the server; only its sound card is not there."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from launch_files import FRAME, Checkpoint
from serving_support import Models, run, served, until, voices

LENGTH = 24
Callback = Callable[[np.ndarray, int, Any, Any], None]


class Card(ModuleType):
    """Stands for the module `sounddevice`: a microphone that says `pcm`, a speaker that keeps."""

    def __init__(self, pcm: np.ndarray) -> None:
        super().__init__("sounddevice")
        self.frames, self.played = list(pcm.reshape(-1, FRAME, 1)), []

    def InputStream(self, callback: Callback, **_: Any) -> Stream:  # noqa: N802
        def say() -> None:
            if self.frames:
                callback(self.frames.pop(0), FRAME, None, None)

        return Stream(say)

    def OutputStream(self, callback: Callback, **_: Any) -> Stream:  # noqa: N802
        def play() -> None:
            sound = np.zeros((FRAME, 1), np.float32)
            callback(sound, FRAME, None, None)
            if sound.any():
                self.played.append(sound)

        return Stream(play)


class Stream:
    """Calls back from a thread of its own, faster than a card would."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call, self._open = call, True
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._thread.join()

    def _run(self) -> None:
        while self._open:
            self._call()
            time.sleep(0.01)


class Printer:
    """Keeps what the client would print."""

    def __init__(self) -> None:
        self.text, self.logged = "", []

    def print_token(self, token: str) -> None:
        self.text += token

    def log(self, level: str, message: str) -> None:
        self.logged.append((level, message))

    def __getattr__(self, name: str) -> Callable[[], None]:
        return lambda: None


@pytest.mark.parametrize("token", [None, "s3cret"])
def test_moshis_client(
    token: str | None, small_moshi: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pcm,) = voices(small_moshi.speech, 1, LENGTH)
    card, printer, models = Card(pcm), Printer(), Models.of(small_moshi)
    monkeypatch.setitem(sys.modules, "sounddevice", card)
    monkeypatch.delitem(sys.modules, "moshi.client", raising=False)
    import moshi.client

    async def test() -> None:
        async with served(models, 1, token=token) as server:
            url = f"ws://me:{token}@localhost:{server.port}" if token else None
            args = SimpleNamespace(url=url, host="localhost", port=server.port, https=False)
            client = asyncio.ensure_future(moshi.client.run(printer, args))
            await until(lambda: len(card.played) == LENGTH - 1, seconds=30)
            await server.host.stop()
            await client

    run(test())
    assert printer.text.strip()
    # The client says so of the handshake, to Moshi's own server too.
    warned = {message for level, message in printer.logged if level != "info"}
    assert warned == {"unknown message kind 0"}
