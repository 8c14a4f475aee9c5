"""A server from its port to the signal that ends it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import ssl
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..checks import device_here
from ..launch import Install, say
from .accept import Door
from .clock import Clock, model_thread
from .codec import CODECS
from .engine import Engine
from .host import Host
from .listen import bound, tls
from .load import Files, load
from .metrics import Metrics
from .pool import Pool, workers_for
from .room import room_for
from .sessions import Sessions
from .signals import signalled
from .talk import Limits
from .token import check_token
from .web import Web

if TYPE_CHECKING:
    from .neighbours import Neighbours
    from .others import Others


@dataclass
class Options:
    """What the command line says beside the model.

    Args:
        ssl: folder with `cert.pem` and `key.pem`, as for `moshi.server`.
        sessions: folder; `None`: conversations are not saved.
        save_every: seconds.
        keep: seconds after which a session that nobody came back to is deleted.
    """

    rows: int
    host: str = "localhost"
    port: int = 8998
    token: str | None = None
    ssl: Path | None = None
    sessions: Path | None = None
    save_every: float = 30.0
    keep: float = 24 * 3600.0
    limits: Limits = field(default_factory=Limits)

    def check(self) -> None:
        """What can be judged without the machine.

        Raises:
            ValueError: `token` or `rows` cannot be used.
        """
        check_token(self.token)
        if self.rows < 1:
            raise ValueError(f"--rows must be at least 1, got {self.rows}")

    def store(self) -> Sessions | None:
        """Where conversations are saved.

        Raises:
            ValueError: the folder cannot be written to.
        """
        return None if self.sessions is None else Sessions(self.sessions, self.keep)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.ssl else 'http'}://{host}:{self.port}"

    def absolute(self) -> Options:
        """The same, for a process with another working directory."""
        folders = {name: getattr(self, name) for name in ("ssl", "sessions")}
        return replace(self, **{name: path and path.absolute() for name, path in folders.items()})


@dataclass
class Work:
    """What a server is to do, whatever runs it."""

    options: Options
    files: Files
    install: Install


@dataclass
class Server:
    """What is ready to serve; made by `prepare`."""

    options: Options
    thread: ThreadPoolExecutor
    engine: Engine
    piece: Callable[[int], str]
    sessions: Sessions | None
    sockets: list[socket.socket]
    context: ssl.SSLContext | None
    others: Others | None = None  # that share `sessions`
    neighbours: Neighbours | None = None  # that share the port
    pool: Pool = field(default_factory=lambda: Pool(0))

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM; then save every conversation."""
        try:
            asyncio.run(self.serve(lambda host: signalled()))
        finally:
            self.thread.shutdown()

    async def serve(self, until: Callable[[Host], Awaitable[None]]) -> None:
        """Serve until `until` returns, which is given the conversations; then save every one.

        Raises:
            BaseException: what the model failed with; conversations were closed, not saved.
        """
        metrics = Metrics(self.engine.rows, self.engine.state_bytes())
        clock = Clock(self.engine, metrics, self.thread)
        options = self.options
        await self.pool.attach()
        host = Host(self.engine, clock, metrics, self.piece, self.sessions, options.save_every,
                    self.others, {**CODECS, "opus": self.pool.opus})  # fmt: skip
        application = Web(host, options.limits, options.token).application()
        door = Door(application, self.sockets, self.engine.rows, self.context, self.neighbours,
                    lambda: host.free)  # fmt: skip
        stepping = asyncio.ensure_future(clock.run())
        tasks = [stepping, *map(asyncio.ensure_future, (until(host), self.pool.keep()))]
        if self.sessions is not None:
            tasks.append(asyncio.ensure_future(host.save()))
        try:
            tasks += await door.open()
            say(f"{self.engine.rows} conversations at {options.url}")
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if stepping not in done:
                say(f"stopping; conversations that end: {host.conversations}")
                clock.halt()  # nothing can fail once clients were told that they are saved
                await asyncio.wait([stepping])
            await (host.abandon() if stepping.exception() else host.stop())
            for task in (stepping, *done):
                task.result()  # a fault is shown, and ends the process
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await door.close()
            self.pool.close()


def prepare(
    work: Work, others: Others | None = None, neighbours: Neighbours | None = None
) -> Server:
    """Load the model and make all ready; what can be refused before that is.

    Args:
        others: servers that share the folder of sessions.
        neighbours: those of them that share the port, too.

    Raises:
        OSError: files are missing.
        ValueError: the port, certificate, device, folder of sessions or model cannot be used, or a
            process that codes Opus cannot be started.
        ttt_cache.launch.Refused: the cache does not fit the model.
    """
    options, files, install = work.options, work.files, work.install
    options.check()
    device_here("--device", files.device)
    context = None if options.ssl is None else tls(options.ssl)
    sessions = options.store()
    with contextlib.ExitStack() as undo:
        sockets = bound(options.host, options.port, shared=neighbours is not None)
        for each in sockets:
            undo.enter_context(each)
        pool = Pool(workers_for(options.rows))
        undo.callback(pool.close)
        thread = model_thread(files.device)
        undo.callback(thread.shutdown)

        def start() -> tuple[Engine, Callable[[int], str]]:
            loaded = load(files, install, options.rows)
            with room_for(options.rows, loaded.row_bytes, loaded.gen.lm_model.device):
                engine = Engine(loaded.gen, loaded.mimi, options.rows)
                engine.warm_up()
            return engine, loaded.tokenizer.id_to_piece  # type: ignore[attr-defined]

        engine, piece = thread.submit(start).result()
        gc.freeze()  # what is loaded stays: to look through all of it takes a fifth of a second
        undo.pop_all()
    return Server(options, thread, engine, piece, sessions, sockets, context, others,
                  neighbours, pool)  # fmt: skip
