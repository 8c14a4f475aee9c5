"""An event loop whose time is made up: it passes when there is nothing else to do.

What is raced in it is raced the same way each time, and an hour of waiting takes no time.
"""

from __future__ import annotations

import asyncio
import selectors
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any


class Turns(asyncio.SelectorEventLoop):
    """Turns of callbacks; between them time jumps to whatever is due next.

    Attributes:
        complaints: what was told to the exception handler.
    """

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Selector(self))
        self.complaints: list[dict[str, Any]] = []
        self.set_exception_handler(lambda _, context: self.complaints.append(context))

    def time(self) -> float:
        return self.now

    def turn(self, times: int = 1) -> None:
        """Call back what is ready, without time passing."""
        for _ in range(times):
            self.run_until_complete(asyncio.sleep(0))

    def pass_time(self, seconds: float) -> None:
        self.run_until_complete(asyncio.sleep(seconds))


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: Turns) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list:
        events = super().select(0)
        if not events:
            assert timeout is not None, "all wait for one another"
            self._loop.now += max(timeout, 0)
        return events


class Worker(Executor):
    """Stands for a pool of one thread, each of whose works takes `seconds`."""

    def __init__(self, loop: Turns, seconds: float) -> None:
        self.seconds = seconds
        self._loop, self._busy = loop, False
        self._waiting: deque[tuple[Future, Callable[[], Any]]] = deque()

    def submit(self, work: Callable[..., Any], /, *args: Any, **options: Any) -> Future:
        future: Future = Future()
        self._waiting.append((future, lambda: work(*args, **options)))
        if not self._busy:
            self._next()
        return future

    def _next(self) -> None:
        self._busy = bool(self._waiting)
        if self._busy:
            future, work = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                self._loop.call_later(self.seconds, self._work, future, work)
            else:
                self._next()

    def _work(self, future: Future, work: Callable[[], Any]) -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)
        self._next()
