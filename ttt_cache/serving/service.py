"""All of a server but its network: a model, its rows, their clock and who has them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .clock import Clock, model_thread
from .engine import Engine
from .host import Host
from .load import Files, load
from .metrics import Metrics
from .sessions import Sessions

if TYPE_CHECKING:
    from ..launch import Install
    from .others import Others


@dataclass
class Model:
    """What is loaded: a thread that all work is done in, the rows, the text of a token."""

    thread: ThreadPoolExecutor
    engine: Engine
    piece: Callable[[int], str]


def start(files: Files, install: Install, rows: int) -> Model:
    """Load a model in a thread of its own, ready to step.

    Raises:
        OSError: files are missing.
        ValueError, RuntimeError: the model cannot be used.
        ttt_cache.launch.Refused: the cache does not fit it.
    """

    def begin() -> Model:
        loaded = load(files, install, rows)
        engine = Engine(loaded.gen, loaded.mimi, rows)
        engine.warm_up()
        return Model(thread, engine, loaded.tokenizer.id_to_piece)  # type: ignore[attr-defined]

    with contextlib.ExitStack() as undo:
        thread = model_thread(files.device)
        undo.callback(thread.shutdown)
        model = thread.submit(begin).result()
        undo.pop_all()
    return model


class Service:
    """Conversations with one model, whatever network brings them to `host`.

    Args:
        sessions: where they are saved; `None`: they are not.
        save_every: seconds.
        others: servers that share `sessions`.
    """

    def __init__(
        self,
        model: Model,
        sessions: Sessions | None,
        save_every: float,
        others: Others | None = None,
    ) -> None:
        engine = model.engine
        self.metrics = Metrics(engine.rows, engine.state_bytes())
        self._clock = Clock(engine, self.metrics, model.thread)
        self.host = Host(
            engine, self._clock, self.metrics, model.piece, sessions, save_every, others
        )
        self._saving = sessions is not None

    async def run(self, until: Awaitable[object]) -> None:
        """Step and save until `until` is done; then every conversation is saved and closed.

        Raises:
            BaseException: what the model failed with; conversations were closed, not saved.
        """
        ending = asyncio.ensure_future(until)
        tasks = [asyncio.ensure_future(self._clock.run()), ending]
        if self._saving:
            tasks.append(asyncio.ensure_future(self.host.save()))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            await (self.host.stop() if ending in done else self.host.abandon())
            for task in done:
                task.result()  # a fault is shown, and ends the process
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
