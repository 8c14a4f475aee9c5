"""`ttt-cache demo`: what a memory recalls and costs, seen on the user's own machine in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import INTERRUPTED, fail, refusals
from .options import number


def demo(
    frames: Annotated[
        int, number("Length of the conversations in frames of 80 ms, at least 256.")
    ] = 3000,
    seed: Annotated[int, number("Seed of what is told and asked, from 0.")] = 0,
    threads: Annotated[int, number("CPU threads, at least 1.")] = 1,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda or cuda:N.", show_default="cuda if there is one, else cpu"),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for demo.png and demo.json.", metavar="FOLDER")
    ] = Path("out/demo"),
) -> None:
    """Tell a small Moshi facts, talk for minutes, and ask for them.

    The same model four times, side by side: with a window of some frames, as it
    is (its ring keeps 1024 frames, 82 s), with a cache of every frame, and with
    the hierarchical cache, whose memory was trained. The result is a table of
    what each says, its right answers by the age of the facts, the size of its
    state and the time of its steps; a picture and a JSON file. The model comes
    with the package. Two idle CPU cores are enough: about two minutes.

    Example: ttt-cache demo --seed 1 --out out/other-facts
    """
    from rich.console import Console

    try:
        with Console(stderr=True).status("Loading PyTorch and Moshi"):
            from ttt_cache.demo.plan import make_plan
            from ttt_cache.demo.run import run
            from ttt_cache.files import make_folder

        with refusals():
            plan = make_plan(frames, seed, threads, device, out)
            make_folder("--out", plan.out)
        run(plan)
    except KeyboardInterrupt:
        raise fail(
            "demo interrupted before its end; fewer --frames are quicker", INTERRUPTED
        ) from None
