"""The command line: one file per command."""

from __future__ import annotations

from typing import Annotated

import typer

from ttt_cache.version import __version__

from .bench import bench
from .demo import demo
from .distill import distill
from .evaluate import evaluate
from .launch import CONTEXT, launch
from .report import report
from .serve import serve
from .train import train

main = typer.Typer(
    name="ttt-cache",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start with: ttt-cache demo",
)
main.command()(demo)
main.command()(report)
main.command()(train)
main.command()(distill)
main.command()(evaluate)
main.add_typer(bench, name="bench")
main.command(context_settings=CONTEXT)(launch)
main.command()(serve)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ttt-cache {__version__}")
        raise typer.Exit


@main.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Hours of conversation with Moshi at constant memory.

    Moshi keeps the last 3000 frames (4 minutes, 12.5 frames a second) of a
    conversation in a ring of keys and values, 1.57 GB of it for Moshi 7B, and
    forgets the rest. ttt-cache keeps the last 100 frames exactly and folds
    everything older into a small memory that goes on learning.
    """


__all__ = ["main"]
