"""`ttt-cache bench serve`: how many conversations a server holds in real time."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from .errors import INTERRUPTED, fail, refusals
from .options import number, numbers


def serve(
    url: Annotated[
        str, typer.Option(metavar="URL", help="Of the server: ws, wss, http or https.")
    ] = "ws://localhost:8998",
    token: Annotated[
        str | None,
        typer.Option(
            envvar="TTT_CACHE_TOKEN", help="What the server wants; better in the environment."
        ),
    ] = None,
    clients: Annotated[
        list[int] | None,
        numbers(
            "Conversations at once, at least 1",
            "a ramp: doubled until they are not held, then the gap halved",
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(metavar="SECONDS", help="Measured of each level, at least 1.")
    ] = 20.0,
    warm_up: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="Before that, of each level: 10 fill a window of 100 frames, the default.",
        ),
    ] = 10.0,
    codec: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="Of the sound: opus, as Moshi's clients; pcm, plain samples."
        ),
    ] = "opus",
    seed: Annotated[int, number("Seed of what the clients say, from 0.")] = 0,
    out: Annotated[
        Path,
        typer.Option(help="Folder for serve.json, serve.csv and serve.png.", metavar="FOLDER"),
    ] = Path("out/bench-serve"),
) -> None:
    """Put conversations on a running server until it is no longer in real time.

    Clients speak Moshi's protocol as moshi.client does: a frame of sound each
    80 ms, whatever the server does. Time counts from when a frame was due until
    its answer was there. Conversations are held in real time if 99% of their
    frames are answered within 80 ms, and none is lost or refused.

    It is a load: use it on your own servers only. Start one first:

    ttt-cache serve --rows 64 --memory cluster

    Example: ttt-cache bench serve --clients 8 --clients 16
    """
    if find_spec("prometheus_client") is None:
        raise fail("this needs prometheus_client: pip install 'ttt-cache[serve]'")
    from rich.console import Console

    try:
        with Console(stderr=True).status("Looking for the server"), refusals():
            from ttt_cache.bench.serve.plan import make_plan
            from ttt_cache.bench.serve.probe import probe
            from ttt_cache.bench.serve.run import run
            from ttt_cache.files import make_folder

            plan = make_plan(url, token, clients, seconds, warm_up, codec, seed, out)
            delay = probe(plan)
            make_folder("--out", plan.out)
        result = run(plan, delay)
    except KeyboardInterrupt:
        raise fail("bench serve interrupted before its first level ended", INTERRUPTED) from None
    if result["interrupted"]:
        raise fail("bench serve interrupted; what was measured is written", INTERRUPTED)
