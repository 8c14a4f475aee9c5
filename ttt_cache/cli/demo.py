"""`ttt-cache demo`: the saving, seen on the user's own machine in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .errors import INTERRUPTED, fail, refusals
from .options import Chunk, Memory, Preset, Recent, Virtual, given, number


def demo(
    wav: Annotated[
        Path | None,
        typer.Argument(
            metavar="[WAV]",
            help="Speech to hear, over and over; any rate and channels, its first 30 s.",
            show_default="a clip of 10 s",
        ),
    ] = None,
    frames: Annotated[
        int, number("Length of the conversation in frames of 80 ms, at least 1.")
    ] = 6000,
    preset: Preset = None,
    recent: Recent = None,
    virtual: Virtual = None,
    chunk: Chunk = None,
    memory: Memory = None,
    depformer: Annotated[
        bool,
        typer.Option(
            "--depformer",
            help="Run Moshi's second transformer too. The patch does not touch it and steps take "
            "about three times as long, so by default its tokens are taken from the clip.",
        ),
    ] = False,
    seed: Annotated[int, number("Seed of weights and sampling, from 0.")] = 0,
    threads: Annotated[int, number("CPU threads, at least 1.")] = 1,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda or cuda:N.", show_default="cuda if there is one, else cpu"),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for demo.png and demo.json.", metavar="FOLDER")
    ] = Path("out/demo"),
) -> None:
    """Hold one long conversation with a stock and a patched Moshi, side by side.

    Both hear the same speech through Mimi, Moshi's codec. The models are small,
    with Moshi's own structure and context of 3000 frames (4 minutes), so that
    two idle CPU cores are enough: about two minutes. The result is a table, a picture
    and a JSON file with the size of the streaming state (bytes) and the time per
    step (ms). All weights are random: this shows cost, not quality of speech.

    Example: ttt-cache demo my-voice.wav --recent 50 --out out/short-window

    Another system: ttt-cache demo --preset ttt-window
    """
    from rich.console import Console

    console = Console(stderr=True)
    try:
        with console.status("Loading PyTorch and Moshi"):
            from ttt_cache.demo.pair import Size, make_pair
            from ttt_cache.demo.plan import make_folder, make_plan
            from ttt_cache.demo.run import run

        settings = given(preset=preset, recent=recent, virtual=virtual, chunk=chunk, memory=memory)
        with console.status("Building both models"), refusals():
            plan = make_plan(wav, frames, settings, depformer, seed, threads, device, out)
            stock, patched, handle = make_pair(Size(), plan.config, plan.seed, plan.device)
            make_folder(plan.out)
        run(plan.resolved(handle.config), stock, patched)
    except KeyboardInterrupt:
        raise fail(
            "demo interrupted before its end; fewer --frames are quicker", INTERRUPTED
        ) from None
