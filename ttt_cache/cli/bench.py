"""`ttt-cache bench`: what one attention core costs on the user's own machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .bench_serve import serve
from .errors import INTERRUPTED, fail, refusals
from .options import number, numbers

WRONG = 1  # the exit status where an arm computes something else
bench = typer.Typer()
bench.command()(serve)


@bench.callback(invoke_without_command=True)
def core(
    context_: typer.Context,
    batch: Annotated[
        list[int] | None,
        numbers("Conversations at once, at least 1", "1 and 4; on a GPU 1, 8, 32 and 64"),
    ] = None,
    context: Annotated[
        list[int] | None, numbers("Frames in the ring of stock Moshi", "3000 and 8000")
    ] = None,
    recent: Annotated[
        int, number("Frames that the patched arms keep exactly (80 ms each), at least 1.")
    ] = 100,
    virtual: Annotated[int, number("Virtual tokens that are read out of the memory.")] = 10,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="float32, bfloat16 or float16.",
            show_default="float32, on a GPU bfloat16",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda or cuda:N.", show_default="cuda if there is one, else cpu"),
    ] = None,
    threads: Annotated[int, number("CPU threads, at least 1.")] = 1,
    repetitions: Annotated[
        int, number("Samples of each arm, at least 3; each is a whole chunk of 8 steps.")
    ] = 15,
    seed: Annotated[int, number("Seed of weights and frames, from 0.")] = 0,
    out: Annotated[
        Path,
        typer.Option(help="Folder for bench.json, bench.csv and bench.png.", metavar="FOLDER"),
    ] = Path("out/bench"),
) -> None:
    """Time one attention core of Moshi 7B: as it is, patched, and by others' kernels.

    A core is everything between a layer's projections. Stock Moshi reads a ring
    of every frame that it remembers; the patched one reads the last frames and
    the virtual tokens of a memory, and trains that memory. All take turns in
    one process, and none is timed unless it computes what it should: what stock
    Moshi does while nothing has left the window, and what the reference path
    does after. On two idle CPU cores it takes about two minutes.

    Example: ttt-cache bench --batch 1 --batch 8 --context 3000

    How many conversations a server holds: ttt-cache bench serve --help
    """
    if context_.invoked_subcommand is not None:
        _refuse_options(context_)
        return
    import os

    from rich.console import Console

    # Read when PyTorch starts its threads: those that wait must not spin on others' cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    try:
        with Console(stderr=True).status("Loading PyTorch and Moshi"):
            from ttt_cache.bench.check import WrongAnswerError
            from ttt_cache.bench.plan import CONTEXTS, make_plan
            from ttt_cache.bench.run import run
            from ttt_cache.files import make_folder

        with refusals():
            plan = make_plan(
                batch, context or CONTEXTS, recent, virtual, dtype, device, threads, repetitions,
                seed, out,
            )  # fmt: skip
            make_folder("--out", plan.out)
        try:
            run(plan)
        except WrongAnswerError as error:
            raise fail(str(error), WRONG) from None
    except KeyboardInterrupt:
        raise fail(
            "bench interrupted before its end; fewer --repetitions are quicker", INTERRUPTED
        ) from None


def _refuse_options(context: typer.Context) -> None:
    """Options before the name of a subcommand would be taken for its own, and do nothing."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            command = context.invoked_subcommand
            raise fail(f"--{name} is no option of 'bench {command}'; see its --help")
