"""`ttt-cache launch`: any program of Moshi's, or one's own, with the cache in its model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import INTERRUPTED, fail, reason, refusals
from .options import Chunk, Memory, Preset, Recent, Sinks, Virtual, given, parse_layers

if TYPE_CHECKING:
    from ttt_cache.launch import Install

# Everything after MODULE is the program's, whatever it looks like.
CONTEXT = {"allow_interspersed_args": False}

Adapter = Annotated[
    str | None,
    typer.Option(
        "--ttt-cache",
        metavar="ADAPTER",
        help="Folder of a trained adapter, or its id on the Hugging Face hub. It brings its "
        "own settings; without it give some of those below, for an untrained cache.",
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        help="Layers to patch: 'all', 25-31, 0,3,5 or -1 (the last one).", show_default="all"
    ),
]


def launch(
    program: Annotated[
        str,
        typer.Argument(
            metavar="MODULE",
            help="moshi.server, moshi.run_inference, moshi.run_tts, a module or a script (x.py).",
        ),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="ARGUMENTS", help="The program's own, passed on untouched."),
    ] = None,
    adapter: Adapter = None,
    layers: Layers = None,
    preset: Preset = None,
    recent: Recent = None,
    virtual: Virtual = None,
    chunk: Chunk = None,
    sinks: Sinks = None,
    memory: Memory = None,
) -> None:
    """Run a Moshi program, unchanged, with the cache in its language model.

    Put 'ttt-cache launch' where 'python -m' stands. The cache is installed in
    every model that moshi's CheckpointInfo hands out, and stderr says in which
    layers and what a conversation costs. All of the program is its own: flags,
    output, exit status, Ctrl-C. docs/launch.md has a section for each program.

    Example: ttt-cache launch --ttt-cache out/my-adapter moshi.server --half

    No training: ttt-cache launch --memory cluster moshi.run_inference in.wav out.wav

    The program's own help: ttt-cache launch moshi.server --help
    """
    install = installer(
        adapter,
        layers=layers,
        preset=preset,
        recent=recent,
        virtual=virtual,
        chunk=chunk,
        sinks=sinks,
        memory=memory,
    )
    from ttt_cache.launch import Refused, run

    try:
        status = run(program, arguments or [], install)
    except Refused as refused:
        raise fail(reason(refused)) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    raise typer.Exit(status)


def installer(adapter: str | None, *, layers: str | None, **options: Any) -> Install:
    """What installs the cache that the options name; what is wrong with them ends the command.

    Args:
        adapter: as `--ttt-cache` gives it.
        layers: as `--layers` gives them.
        options: settings under their names; `None` was not given.
    """
    settings = given(layers=layers, **options)
    if adapter is not None and settings:
        raise fail(f"--ttt-cache and --{next(iter(settings))} exclude each other: an adapter is "
                   "run with the settings that it was trained with")  # fmt: skip
    with refusals():
        if layers is not None:
            settings["layers"] = parse_layers(layers)

    from ttt_cache.launch import from_adapter, from_settings

    with refusals("", FileNotFoundError):
        return from_settings(settings) if adapter is None else from_adapter(adapter)
