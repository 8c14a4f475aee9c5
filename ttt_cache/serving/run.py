"""A server from its port to the signal that ends it."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from aiohttp import web

from ..launch import Install, say
from .engine import Engine
from .host import Host
from .listen import bound, tls
from .load import Files
from .service import Model, Service, start
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

    def check(self) -> None:
        """What can be judged without the machine.

        Raises:
            ValueError: `token` or `rows` cannot be used.
        """
        token = self.token
        if token is not None and not (token.isascii() and token.isprintable() and token.strip()):
            raise ValueError("--token must be printable ASCII characters, and at least one")
        if self.rows < 1:
            raise ValueError(f"--rows must be at least 1, got {self.rows}")

    def absolute(self) -> Options:
        """The same, for a process with another working directory."""
        return replace(self, sessions=self.sessions and self.sessions.absolute())

    def store(self) -> Sessions | None:
        """Where conversations are saved.

        Raises:
            ValueError: the folder cannot be written to.
        """
        return None if self.sessions is None else Sessions(self.sessions, self.keep)


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

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM; then save every conversation."""
        try:
            asyncio.run(self._run())
        finally:
            self.thread.shutdown()

    async def _run(self) -> None:
        options, model = self.options, Model(self.thread, self.engine, self.piece)
        service = Service(model, self.sessions, options.save_every)
        application = Web(service.host, options.limits, options.token).application()
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=5)
        await runner.setup()
        ending = asyncio.ensure_future(_told_to_end(service.host))
        try:
            for listener in self.sockets:
                await web.SockSite(runner, listener, ssl_context=self.context).start()
            scheme = "https" if self.context else "http"
            say(f"{self.engine.rows} conversations at {scheme}://{options.host}:{options.port}")
            await service.run(ending)
        finally:
            ending.cancel()
            await runner.cleanup()


def prepare(options: Options, files: Files, install: Install) -> Server:
    """Load the model and make all ready; what can be refused before that is.

    Raises:
        OSError: files are missing.
        ValueError: the port, the certificate, the folder of sessions or the model cannot be used.
        ttt_cache.launch.Refused: the cache does not fit the model.
    """
    options.check()
    context = None if options.ssl is None else tls(options.ssl)
    sessions = options.store()
    with contextlib.ExitStack() as undo:
        sockets = bound(options.host, options.port)
        for each in sockets:
            undo.enter_context(each)
        model = start(files, install, options.rows)
        undo.pop_all()
    return Server(options, model.thread, model.engine, model.piece, sessions, sockets, context)


async def _told_to_end(host: Host) -> None:
    await signalled()
    say(f"stopping; conversations that end: {host.conversations}")


async def signalled() -> None:
    """Wait for SIGINT or SIGTERM. A second one ends the process at once."""
    loop, came = asyncio.get_running_loop(), asyncio.Event()
    both = (signal.SIGINT, signal.SIGTERM)
    for each in both:
        loop.add_signal_handler(each, came.set)
    await came.wait()
    for each in both:
        loop.remove_signal_handler(each)
