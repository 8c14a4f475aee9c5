"""`ttt-cache train`: a run from its YAML, on one process or many."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .errors import INTERRUPTED, fail, reason, refusals

if TYPE_CHECKING:
    from ttt_cache.training.engine import Run
    from ttt_cache.training.settings import Settings

EXTRA = ("accelerate", "pydantic", "yaml", "tensorboard")

Config = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG.yaml",
        help="The run: model, data, stages and where it goes. Examples are in the folder examples.",
        show_default=False,
    ),
]


def train(config: Config) -> None:
    """Train the memory of a patched Moshi, and Moshi with it if asked for.

    The YAML has moshi-finetune's keys (data, moshi_paths, optim, batch_size,
    max_steps, lora, ...) and a block ttt_cache: with the settings of the patch
    and the stages: distill (layer by layer), compressor (the memory, by Moshi's
    loss), layers (and the patched layers), everything. A key that is wrong is
    named before anything is loaded.

    In run_dir come: adapter/ (ttt_cache.load_adapter reads it), Moshi's weights
    or a LoRA if they were trained, metrics.jsonl, tensorboard/, training.png,
    checkpoints/ and summary.md: whether the memory is used, in words, and with
    eval_data the result beside its controls.

    Resume: give the same command again. It goes on from the last checkpoint.

    Several GPUs: accelerate launch --num_processes 4 -m ttt_cache.cli train CONFIG.yaml

    Example: ttt-cache train examples/cpu.yaml
    """
    run(config, lambda settings: settings)


def run(config: Path, change: Callable[[Settings], Settings]) -> None:
    """Read a YAML, change its settings and train what they then say."""
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise fail(f"training needs {', '.join(missing)}: pip install 'ttt-cache[train]'")
    from ttt_cache.training.config_file import read_settings

    with refusals("", OSError):
        settings = change(read_settings(config))
    begun = None
    try:
        with _interruptible():
            begun = _load(settings)
            _train(begun)
    except KeyboardInterrupt:
        kept = _kept(settings) if begun else "nothing was trained or overwritten yet"
        raise fail(f"interrupted; {kept}", INTERRUPTED) from None


@contextmanager
def _interruptible() -> Iterator[None]:
    """Within it SIGTERM, which says that the machine is taken away, is as Ctrl-C.

    Not for one of several processes: they cannot save without the others, and a launcher that
    ends them must not wait.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _load(settings: Settings) -> Run:
    from rich.console import Console

    with Console(stderr=True).status("Loading PyTorch and Moshi"):
        from ttt_cache.training.engine import Run

    with refusals("", OSError):
        return Run(settings)


def _train(begun: Run) -> None:
    from ttt_cache.training.finite import NotFiniteError

    try:
        begun.train()
    except (OSError, ValueError, NotFiniteError) as error:
        raise fail(reason(error)) from None


def _kept(settings: Settings) -> str:
    """What an interrupted run does not have to do again."""
    from ttt_cache.training.checkpoint import checkpoints

    kept = checkpoints(Path(settings.run_dir))
    if not kept and not settings.do_ckpt:
        return "no step was saved: do_ckpt is false"
    if not kept:
        return "no step was saved yet; the same command begins again"
    step = int(kept[-1].name.split("_")[1])
    unless = "without overwrite_run_dir: true " if settings.overwrite_run_dir else ""
    return (
        f"the first {step} steps are saved in {settings.run_dir}; {unless}the same command goes on "
        "from there"
    )
