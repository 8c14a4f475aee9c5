"""Who steps when: every row that has a frame, together, as soon as the model is free.

The model works in one thread of its own, never in the event loop. While it steps, frames arrive;
the next step takes all of them. So a frame waits for at most one step that began before it came,
and the busier the server, the more rows share a step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from .conversation import INBOX, Conversation
from .engine import Engine
from .metrics import Metrics

T = TypeVar("T")


class Clock:
    """Steps the conversations that are put into `conversations`, until it is halted.

    Attributes:
        conversations: by row.
    """

    def __init__(self, engine: Engine, metrics: Metrics, thread: ThreadPoolExecutor) -> None:
        self.conversations: dict[int, Conversation] = {}
        self._engine, self._metrics, self._thread = engine, metrics, thread
        self._awake, self._halted = asyncio.Event(), False

    def wake(self) -> None:
        """There may be something to step."""
        self._awake.set()

    def halt(self) -> None:
        """Let `run` return once all that has come by now is stepped."""
        self._halted = True
        self.wake()

    def steps(self, conversation: Conversation) -> bool:
        """Whether a conversation has not begun to leave."""
        return self.conversations.get(conversation.row) is conversation

    async def call(self, work: Callable[..., T], *args: object) -> T:
        """Do something with the model, between two steps, after what was asked before.

        If the caller is cancelled meanwhile, it may be done or not.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    async def run(self) -> None:
        """Step until `halt`; ends with whatever a step raises."""
        while not self._halted:
            if stepping := self._ready():
                await self._step(stepping)
            else:
                self._awake.clear()
                await self._awake.wait()
        for _ in range(INBOX):  # what has come; who goes on sending is not waited for
            if stepping := self._ready():
                await self._step(stepping)

    def _ready(self) -> dict[int, Conversation]:
        return {c.row: c for c in self.conversations.values() if c.ready}

    async def _step(self, stepping: dict[int, Conversation]) -> None:
        frames = {row: each.take() for row, each in stepping.items()}
        began = time.perf_counter()
        answers = await self.call(self._engine.step, frames)
        late = sum(each.answer(answers[row]) for row, each in stepping.items())
        self._metrics.stepped(len(frames), late, time.perf_counter() - began)


def model_thread(device: str) -> ThreadPoolExecutor:
    """The one thread in which a model is loaded and works."""

    def begin() -> None:
        if torch.device(device).index is not None and torch.device(device).type == "cuda":
            torch.cuda.set_device(device)  # which is each thread's own; graphs are captured there

    return ThreadPoolExecutor(1, "model", initializer=begin)
