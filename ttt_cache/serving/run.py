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

from aiohttp import web

from ..checks import device_here
from ..launch import Install, say
from .clock import Clock, model_thread
from .codec import CODECS
from .engine import Engine
from .host import Host
from .listen import bound, tls
from .load import Files, load
from .metrics import Metrics
from .pool import Pool, workers_for
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
    pool: Pool = field(default_factory=lambda: Pool(0))

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
        await self.pool.attach()
        codecs = {**CODECS, "opus": self.pool.opus}
        host = Host(
            self.engine, clock, metrics, self.piece, self.sessions, options.save_every, codecs
        )
        application = Web(host, options.limits, options.token).application()
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=5)
        await runner.setup()
        signalled = asyncio.ensure_future(_signalled())
        tasks = [asyncio.ensure_future(each) for each in (clock.run(), self.pool.keep())]
        tasks.append(signalled)
        if self.sessions is not None:
            tasks.append(asyncio.ensure_future(host.save()))
        try:
            for listener in self.sockets:
                await web.SockSite(runner, listener, ssl_context=self.context).start()
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
            await runner.cleanup()
            self.pool.close()


def prepare(options: Options, files: Files, install: Install) -> Server:
    """Load the model and make all ready; what can be refused before that is.

    Raises:
        OSError: files are missing.
        ValueError: the port, certificate, device, folder of sessions or model cannot be used, or a
            process that codes Opus cannot be started.
        ttt_cache.launch.Refused: the cache does not fit the model.
    """
    token = options.token
    if token is not None and not (token.isascii() and token.isprintable() and token.strip()):
        raise ValueError("--token must be printable ASCII characters, and at least one")
    if options.rows < 1:
        raise ValueError(f"--rows must be at least 1, got {options.rows}")
    device_here("--device", files.device)
    context = None if options.ssl is None else tls(options.ssl)
    sessions = None
    if options.sessions is not None:
        sessions = Sessions(options.sessions, options.keep)
    with contextlib.ExitStack() as undo:
        sockets = bound(options.host, options.port)
        for each in sockets:
            undo.enter_context(each)
        pool = Pool(workers_for(options.rows))
        undo.callback(pool.close)
        thread = model_thread(files.device)
        undo.callback(thread.shutdown)

        def start() -> tuple[Engine, Callable[[int], str]]:
            loaded = load(files, install, options.rows)
            engine = Engine(loaded.gen, loaded.mimi, options.rows)
            engine.warm_up()
            return engine, loaded.tokenizer.id_to_piece  # type: ignore[attr-defined]

        engine, piece = thread.submit(start).result()
        undo.pop_all()
    return Server(options, thread, engine, piece, sessions, sockets, context, pool)


async def _signalled() -> None:
    """Wait for SIGINT or SIGTERM. A second one ends the process at once."""
    loop, came = asyncio.get_running_loop(), asyncio.Event()
    both = (signal.SIGINT, signal.SIGTERM)
    for each in both:
        loop.add_signal_handler(each, came.set)
    await came.wait()
    for each in both:
        loop.remove_signal_handler(each)
