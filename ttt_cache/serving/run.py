"""A server from its port to the signal that ends it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ..launch import Install, say
from .accept import Door
from .clock import Clock, model_thread
from .engine import Engine
from .host import Host
from .listen import bound, tls
from .load import Files, load
from .metrics import Metrics
from .sessions import Sessions
from .talk import Limits
from .web import Web


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

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM; then save every conversation."""
        try:
            asyncio.run(self._run())
        finally:
            self.thread.shutdown()

    async def _run(self) -> None:
        metrics = Metrics(self.engine.rows, self.engine.state_bytes())
        clock = Clock(self.engine, metrics, self.thread)
        options = self.options
        host = Host(self.engine, clock, metrics, self.piece, self.sessions, options.save_every)
        application = Web(host, options.limits, options.token).application()
        door = Door(application, self.sockets, self.engine.rows, self.context)
        signalled = asyncio.ensure_future(_signalled())
        tasks = [asyncio.ensure_future(clock.run()), signalled]
        if self.sessions is not None:
            tasks.append(asyncio.ensure_future(host.save()))
        try:
            await door.open()
            scheme = "https" if self.context else "http"
            say(f"{self.engine.rows} conversations at {scheme}://{options.host}:{options.port}")
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if signalled not in done:
                await host.abandon()
            else:
                say(f"stopping; conversations that end: {host.conversations}")
                await host.stop()
            for task in done:
                task.result()  # a fault is shown, and ends the process
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await door.close()


def prepare(options: Options, files: Files, install: Install) -> Server:
    """Load the model and make all ready; what can be refused before that is.

    Raises:
        OSError: files are missing.
        ValueError: the port, the certificate, the folder of sessions or the model cannot be used.
        ttt_cache.launch.Refused: the cache does not fit the model.
    """
    token = options.token
    if token is not None and not (token.isascii() and token.isprintable() and token.strip()):
        raise ValueError("--token must be printable ASCII characters, and at least one")
    if options.rows < 1:
        raise ValueError(f"--rows must be at least 1, got {options.rows}")
    context = None if options.ssl is None else tls(options.ssl)
    sessions = None
    if options.sessions is not None:
        sessions = Sessions(options.sessions, options.keep)
    with contextlib.ExitStack() as undo:
        sockets = bound(options.host, options.port)
        for each in sockets:
            undo.enter_context(each)
        thread = model_thread(files.device)
        undo.callback(thread.shutdown)

        def start() -> tuple[Engine, Callable[[int], str]]:
            loaded = load(files, install, options.rows)
            engine = Engine(loaded.gen, loaded.mimi, options.rows)
            engine.warm_up()
            return engine, loaded.tokenizer.id_to_piece  # type: ignore[attr-defined]

        engine, piece = thread.submit(start).result()
        undo.pop_all()
    return Server(options, thread, engine, piece, sessions, sockets, context)


async def _signalled() -> None:
    """Wait for SIGINT or SIGTERM. A second one ends the process at once."""
    loop, came = asyncio.get_running_loop(), asyncio.Event()
    both = (signal.SIGINT, signal.SIGTERM)
    for each in both:
        loop.add_signal_handler(each, came.set)
    await came.wait()
    for each in both:
        loop.remove_signal_handler(each)
