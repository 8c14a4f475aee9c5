"""Other people's programs, unchanged, with a cache in the Moshi that they load."""

from __future__ import annotations

import errno
import functools
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo

from .adapter import load_adapter, locate, read_config
from .config import CacheConfig
from .patch import Patch, adapter_parameters, patch
from .report import summary

Install = Callable[[LMModel], Patch]

FAILED, NOT_INSTALLED, INTERRUPTED = 1, 3, 130  # exit statuses; Python's own, ours, a shell's
HELP = {"-h", "--help"}
MACHINERY = {__name__, "runpy", "pkgutil", "importlib._bootstrap", "importlib._bootstrap_external"}


class Refused(SystemExit):
    """There is no such program, or the cache does not fit its model; the message is one sentence.

    It is no `Exception`, so that a program that catches those cannot go on without the cache.
    """


def from_adapter(folder: str | os.PathLike[str]) -> Install:
    """What installs an adapter.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is damaged. That it fits the model is
            only known once there is one.
    """
    read_config(locate(folder)[0])
    return lambda model: load_adapter(model, folder)


def from_settings(settings: Mapping[str, Any]) -> Install:
    """What installs a cache with settings; its memory, if it has weights, is untrained.

    Raises:
        TypeError, ValueError: a setting is unknown or out of range, as for `patch`.
    """
    config = CacheConfig.from_fields(settings)

    def install(model: LMModel) -> Patch:
        handle = patch(model, config=config)
        if adapter_parameters(model):
            say(f"memory {config.memory} is untrained; --ttt-cache takes one that was trained")
        return handle

    return install


def run(program: str, arguments: Sequence[str], install: Install) -> int:
    """Run a program as Python would, with a cache in every language model that it loads.

    Args:
        program: a module (`python -m`), or a script: a name that ends in `.py` or holds a slash.
        arguments: its own.

    Returns:
        its exit status. A success is turned into `NOT_INSTALLED`, and stderr says so, where the
        program never asked `CheckpointInfo` for a model, unless it was asked for its help.

    Raises:
        Refused: nothing of that name can be run, or the cache does not fit.
        SystemExit: the program's own failure.
    """
    with _as_main(program, arguments), handed_out(install) as installed, _without_cuda():
        try:
            _start(program)
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
        except (Exception, KeyboardInterrupt) as error:
            return _failed(program, error)
    if installed or HELP.intersection(arguments):
        return 0
    say(
        f"{program} ended without asking moshi's CheckpointInfo for a language model: "
        f"no cache was installed (exit status {NOT_INSTALLED})"
    )
    return NOT_INSTALLED


@contextmanager
def handed_out(install: Install) -> Iterator[list[str]]:
    """Install a cache in every language model that `CheckpointInfo.get_moshi` returns meanwhile.

    That is after its weights and LoRA are loaded, and fused if asked for, and before `LMGen` takes
    it. Models keep their cache afterwards; what moshi hands out then has none.

    Yields:
        what stderr was told of each model so far.
    """
    stock, installed = CheckpointInfo.get_moshi, []

    @functools.wraps(stock)
    def get_moshi(self: CheckpointInfo, *args: Any, **kwargs: Any) -> LMModel:
        model = stock(self, *args, **kwargs)
        # A new memory draws weights; what the program samples must depend on its seed alone.
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            try:
                install(model)
                installed.append(summary(model))
            except (TypeError, ValueError, RuntimeError, OSError) as error:
                raise Refused(str(error)) from error
        say(installed[-1])
        return model

    CheckpointInfo.get_moshi = get_moshi
    try:
        yield installed
    finally:
        CheckpointInfo.get_moshi = stock


def say(message: str) -> None:
    """Tell the user; stdout is the program's."""
    print(f"ttt-cache: {message}", file=sys.stderr, flush=True)


def _is_script(program: str) -> bool:
    return program.endswith(".py") or os.sep in program


def _start(program: str) -> None:
    if _is_script(program):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


@contextmanager
def _as_main(program: str, arguments: Sequence[str]) -> Iterator[None]:
    """`sys.argv` and `sys.path` as Python sets them for a script, or for `-m`."""
    argv, path = sys.argv, sys.path
    folder = os.path.dirname(os.path.realpath(program)) if _is_script(program) else os.getcwd()
    sys.argv = [program, *arguments]
    sys.path = path if sys.flags.safe_path else [folder, *path]
    try:
        yield
    finally:
        sys.argv, sys.path = argv, path


@contextmanager
def _without_cuda() -> Iterator[None]:
    """Without CUDA let `torch.cuda.synchronize` do nothing: `moshi.server` calls it anywhere."""
    if torch.cuda.is_available():
        yield
        return
    say("no CUDA device on this machine: Moshi can run on the CPU, with --device cpu")
    synchronize = torch.cuda.synchronize
    torch.cuda.synchronize = lambda device=None: None
    try:
        yield
    finally:
        torch.cuda.synchronize = synchronize


def _failed(program: str, error: BaseException) -> int:
    """Show an error as Python does, without our own frames; returns the exit status."""
    frames = _theirs(error.__traceback__)
    if frames is None and isinstance(error, (ImportError, OSError)):  # it never started
        raise Refused(f"{program} cannot be run: {error}") from None
    sys.excepthook(type(error), error.with_traceback(frames), frames)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        say(f"{program}: the port is in use; stop what listens there, or choose another --port")
    if not torch.cuda.is_available() and ("CUDA" in str(error) or "NVIDIA" in str(error)):
        say(f"{program} asked for CUDA, which this machine has not: give it --device cpu")
    return FAILED


def _theirs(frames: TracebackType | None) -> TracebackType | None:
    """A traceback from the program's first frame on, without `get_moshi` of `handed_out`."""
    while frames is not None and _module(frames) in MACHINERY:
        frames = frames.tb_next
    rest = frames
    while rest is not None:
        while rest.tb_next is not None and _module(rest.tb_next) == __name__:
            rest.tb_next = rest.tb_next.tb_next
        rest = rest.tb_next
    return frames


def _module(frames: TracebackType) -> str | None:
    return frames.tb_frame.f_globals.get("__name__")
