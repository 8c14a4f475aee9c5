"""`ttt-cache evaluate`: what the memory is worth beside its controls, on any Moshi."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import INTERRUPTED, fail, reason, refusals
from .options import Chunk, given, number

if TYPE_CHECKING:
    from ttt_cache.evaluation.experiments import Experiment, Plan
    from ttt_cache.evaluation.protocol import Bench, Point


def _file(help_text: str) -> Any:
    return typer.Option(metavar="FILE", help=help_text, show_default=False)


def evaluate(
    experiment: Annotated[
        str,
        typer.Argument(
            metavar="[EXPERIMENT]",
            help="controls, recent, virtual, gates, layers, training, unbounded, untrained, "
            "generalisation or pairs.",
        ),
    ] = "controls",
    rows: Annotated[
        int | None, number("Conversations, at least 1.", "the experiment's: 4 or 8")
    ] = None,
    frames: Annotated[
        int | None,
        number(
            "Length of a conversation in frames of 80 ms.",
            "the experiment's: 8 contexts; pairs 32,000; unbounded 100,000 or more",
        ),
    ] = None,
    level: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of the testbed's conversations: few, many, rewritten, distant, paused, held or "
            "dialect.",
            show_default="rewritten",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="POINT",
            help="Measure this point alone, a line of the tables, keep it and print its tables; "
            "may be given several times. What compares all, and the files, come without --only.",
            show_default=False,
        ),
    ] = None,
    recent: Annotated[
        int | None, number("Frames that the memory's arms keep exactly.", "32; another Moshi: 100")
    ] = None,
    virtual: Annotated[
        int | None, number("Virtual tokens, at least 1.", "48; another Moshi: 10")
    ] = None,
    chunk: Chunk = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="A trained memory and its settings, from ttt-cache train.",
            show_default="the testbed's own, else one is trained",
        ),
    ] = None,
    hf_repo: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Another Moshi, on Hugging Face.", show_default=False),
    ] = None,
    moshi_weight: Annotated[Path | None, _file("Moshi's weights.")] = None,
    mimi_weight: Annotated[Path | None, _file("Mimi's weights.")] = None,
    tokenizer: Annotated[Path | None, _file("The text tokenizer.")] = None,
    config_path: Annotated[Path | None, _file("Moshi's config.json.")] = None,
    lora_weight: Annotated[Path | None, _file("A LoRA, which is fused.")] = None,
    data: Annotated[
        Path | None,
        _file(
            "Recordings for another Moshi: moshi-finetune's jsonl. Half of them are measured on, "
            "the others trained on."
        ),
    ] = None,
    other_data: Annotated[
        Path | None, _file("Recordings of another kind, for generalisation.")
    ] = None,
    seed: Annotated[int, number("Seed of conversations, training and sampling, from 0.")] = 0,
    threads: Annotated[int, number("CPU threads, at least 1.")] = min(2, os.cpu_count() or 1),
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="cpu, cuda or cuda:N.",
            show_default="cpu for the testbed, else cuda if there is one",
        ),
    ] = None,
    half: Annotated[
        bool, typer.Option("--half", help="Another Moshi in float16, not bfloat16.")
    ] = False,
    out: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Where results, adapters and tokens are kept."),
    ] = Path("out/evaluate"),
) -> None:
    """Measure what the memory is worth: beside full context, a window, and every other control.

    Without options: the small Moshi that comes with ttt-cache, its trained
    memory and 12 arms, in some minutes on two CPU cores.

    controls        the memory beside every control
    recent          the window, 50 to 1000 frames of 3000
    virtual         virtual tokens, 1 to 100
    gates           how window and memory are mixed
    layers          the top 7 of 32 layers, the top half, all
    training        steps of training, beside an extended context
    unbounded       100,000 frames: growth, drift, collapse
    untrained       one layer, nothing trained
    generalisation  trained on one kind of stream, measured on another
    pairs           likelihoods of right and wrong continuations

    In --out come NAME/NAME.json and NAME.png, and in --out/results a file for
    each result: what one experiment measured, another does not measure again.
    Sweeps train an adapter for every point and keep it in --out/adapters. Give
    the same command again to go on after an interruption, or in several
    terminals at once to share the points between them.

    Another Moshi:
    ttt-cache evaluate --hf-repo kyutai/moshiko-pytorch-bf16 --data my.jsonl

    Example: ttt-cache evaluate recent
    """
    from rich.console import Console

    os.environ.setdefault("NO_TORCH_COMPILE", "1")  # minutes, for models that run for minutes
    bench = None
    try:
        with Console(stderr=True).status("Loading PyTorch and Moshi"):
            from ttt_cache.checks import seed_of
            from ttt_cache.evaluation.experiments.generalisation import require_other
            from ttt_cache.evaluation.model import Checkpoint, Data, build
            from ttt_cache.evaluation.protocol import Bench
            from ttt_cache.files import make_folder

            chosen = _chosen(experiment)
            with refusals("", OSError):
                checkpoint = Checkpoint(
                    hf_repo, moshi_weight, mimi_weight, tokenizer, config_path, lora_weight
                )
                where, dtype = _machine(device, checkpoint.is_testbed, half, threads)
                seed_of("--seed", seed)
                settings = given(recent=recent, virtual=virtual, chunk=chunk)
                heard = Data(level, data, other_data, out / "tokens")
                if chosen.name == "generalisation" and not checkpoint.is_testbed:
                    require_other(other_data)
                speaks = chosen.name == "unbounded"
                subject = build(
                    checkpoint, heard, where, dtype, seed, adapter, settings, speaks=speaks
                )
                plan = _plan(chosen, subject, rows, frames)
                points = chosen.points(plan)
                _known(only, points)
        folder = out / chosen.name
        with refusals("", OSError):
            make_folder("--out", folder)
            bench = Bench(subject, out / "results", out / "adapters")
        _conduct(chosen, plan, points, bench, folder, only)
    except KeyboardInterrupt:
        kept = "nothing was measured yet" if bench is None else bench.kept()
        raise fail(f"interrupted; {kept}", INTERRUPTED) from None


def _chosen(name: str) -> Experiment:
    from ttt_cache.checks import one_of
    from ttt_cache.evaluation.experiments import EXPERIMENTS

    with refusals():
        return EXPERIMENTS[one_of("EXPERIMENT", name, tuple(EXPERIMENTS))]


def _machine(name: str | None, is_testbed: bool, half: bool, threads: int) -> tuple[Any, Any]:
    """Where the model runs, and in which dtype one that is not the testbed does."""
    import torch

    from ttt_cache.checks import device_here, threads_here

    if half and is_testbed:
        raise ValueError("--half is for another Moshi: the testbed is float32, leave it out")
    torch.set_num_threads(threads_here("--threads", threads))
    best = "cuda" if torch.cuda.is_available() and not is_testbed else "cpu"
    device = torch.device(best if name is None else device_here("--device", name))
    return device, torch.float16 if half else torch.bfloat16


def _plan(experiment: Experiment, subject: Any, rows: int | None, frames: int | None) -> Plan:
    from ttt_cache.checks import whole_number
    from ttt_cache.evaluation.experiments import Plan

    rows = experiment.rows if rows is None else whole_number("--rows", rows, 1)
    least = 2 * subject.far  # frames of which as many are beyond every window as within
    if frames is None:
        frames = experiment.frames(subject)
    return Plan(subject, rows, whole_number("--frames", frames, least))


def _known(only: list[str] | None, points: list[Point]) -> None:
    names = [point.name for point in points]
    for name in only or ():
        if name not in names:
            shown = ", ".join(map(repr, names))
            raise ValueError(f"--only must be of {shown}; got {name!r}")


def _conduct(
    experiment: Experiment,
    plan: Plan,
    points: list[Point],
    bench: Bench,
    folder: Path,
    only: list[str] | None,
) -> None:
    import torch

    from ttt_cache.evaluation.run import conduct

    try:
        conduct(experiment, plan, points, bench, folder, only or None)
    except (OSError, ValueError) as error:
        raise fail(reason(error)) from None
    except (MemoryError, torch.OutOfMemoryError) as error:
        hint = "out of memory: give fewer --rows or --frames, or leave arms out with --only"
        raise fail(f"{hint} ({reason(error)})") from None
    except RuntimeError as error:
        # A loss or an output that is not finite: our messages, and torch's of sampling, say so.
        if not re.search(r"\b(nan|inf|finite)\b", str(error)):
            raise
        raise fail(f"{reason(error)}; {bench.kept()}") from None
