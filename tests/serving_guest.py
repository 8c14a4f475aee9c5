"""A client in the fuzz of the server: what it said, and what it is to be answered."""

from __future__ import annotations

import asyncio
import json

import sphn
from launch_files import RATE
from serving_fakes import BYTES, FakePeer, answer_to, number_in

from ttt_cache.serving.conversation import Conversation


class Guest:
    """A client: what it said, and what it is to be answered.

    Attributes:
        base: what its conversation had heard before it came.
        stream: bytes of plain samples that it sent.
        refused: the status that it was turned away with.
    """

    def __init__(self, asked: str | None, codec: str) -> None:
        self.asked, self.codec, self.peer = asked, codec, FakePeer()
        self.base: list[int] = []
        self.stream = b""
        self.refused: int | None = None
        self.conversation: Conversation | None = None
        self.connected_after = 0.0
        self.task: asyncio.Task[None]
        self.writer = sphn.OpusStreamWriter(RATE)

    @property
    def history(self) -> list[int]:
        whole = len(self.stream) // BYTES
        return self.base + [number_in(self.stream[at * BYTES :]) for at in range(whole)]

    def answers(self) -> list[bytes]:
        """All that is to come, in order, if nothing goes wrong."""
        history, sent = self.history, []
        for at in range(len(self.base), len(history)):
            if answer := answer_to(history[: at + 1]):
                sent += [b"\x01" + (answer.pcm[:3] * 32767).astype("<i2").tobytes()]
                sent += [b"\x02" + piece(answer.token).encode()]
        return sent

    def check(self) -> None:
        """It got its own answers, each once, in order."""
        if not self.peer.got:
            return
        greeting, *rest = self.peer.got
        assert greeting == b"\x00"
        if self.asked is not None and rest:
            told = json.loads(rest.pop(0).removeprefix(b"\x04"))
            assert self.conversation is not None and told["session"] == self.conversation.name
            assert told["frames"] >= len(self.base)
        if self.codec == "pcm":
            got = [message[:7] if message[:1] == b"\x01" else message for message in rest]
            assert got == self.answers()[: len(got)]


def piece(token: int) -> str:
    return f"<{token}>"
