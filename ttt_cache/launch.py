"""Other people's programs, unchanged, with a cache in the Moshi that they load."""

from __future__ import annotations

import errno
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo

from .adapter import load_adapter, locate, read_config
from .config import CacheConfig
from .exclusions import NETWORKS
from .patch import Patch, patch
from .program import as_main, finish_threads, start, without_frames_of
from .report import summary

Install = Callable[[LMModel], Patch]

FAILED, NOT_INSTALLED = 1, 3  # exit statuses: Python's own, ours
HELP = {"-h", "--help"}


class Refused(SystemExit):
    """There is no such program, or the cache does not fit its model; its code is one sentence."""


@dataclass
class HandedOut:
    """What became of the language models that a program asked `CheckpointInfo` for.

    Attributes:
        asked: it asked for one, whatever came of it.
        installed: what stderr was told of each model that has a cache.
        refused: why a model was not handed out, for each that the cache does not fit.
    """

    asked: bool = False
    installed: list[str] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)


def from_adapter(folder: str | os.PathLike[str]) -> Install:
    """What installs an adapter.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is damaged. That it fits the model is
            only known once there is one.
    """
    read_config(locate(folder)[0])
    return lambda model: load_adapter(model, folder)


def from_settings(settings: Mapping[str, Any]) -> Install:
    """What installs a cache with settings; a memory that learns is untrained, and stderr says so.

    Raises:
        TypeError, ValueError: a setting is unknown or out of range, as for `patch`.
    """
    config = CacheConfig.from_fields(settings)

    def install(model: LMModel) -> Patch:
        handle = patch(model, config=config)
        if config.memory in NETWORKS:
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
        program got no model from `CheckpointInfo`, unless it was asked for its help alone.

    Raises:
        Refused: nothing of that name can be run, or the cache does not fit, however it ended.
        SystemExit: the program's own failure.
        KeyboardInterrupt: nor did it handle that; its traceback has been shown.
    """
    given = any(word.partition("=")[0] == "--device" for word in arguments)
    with as_main(program, arguments), handed_out(install, given) as handed, _without_cuda():
        end = _end_of(program)
    if handed.refused:
        raise handed.refused[0]
    if end is not None:
        raise end
    if handed.installed or (HELP.intersection(arguments) and not handed.asked):
        return 0
    say(
        f"{program} ended without a language model from moshi's CheckpointInfo in its own "
        f"process: no cache was installed (exit status {NOT_INSTALLED})"
    )
    return NOT_INSTALLED


@contextmanager
def handed_out(install: Install, device_given: bool = False) -> Iterator[HandedOut]:
    """Install a cache in every language model that `CheckpointInfo.get_moshi` returns meanwhile.

    That is after its weights and LoRA are loaded, and fused if asked for, and before `LMGen` takes
    it. Models keep their cache afterwards; what moshi hands out then has none.

    Args:
        device_given: by the user, who need not be told where the model runs without CUDA.

    Yields:
        what became of each model so far.
    """
    stock, handed = CheckpointInfo.get_moshi, HandedOut()

    @functools.wraps(stock)
    def get_moshi(self: CheckpointInfo, *args: Any, **kwargs: Any) -> LMModel:
        handed.asked = True
        model = stock(self, *args, **kwargs)
        # A new memory draws weights; what the program samples must depend on its seed alone.
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            try:
                install(model)
                told = summary(model)
            except (TypeError, ValueError, RuntimeError, OSError) as error:
                handed.refused.append(Refused(str(error)))
                # No `Exception`, so that a program that catches those does not go on without the
                # cache, and the one that `threading` ends a thread with, without a traceback.
                raise SystemExit(str(error)) from error
        handed.installed.append(told)
        say(told)
        if not device_given and not torch.cuda.is_available():
            say("there is no CUDA on this machine: the model runs on the CPU")
        return model

    CheckpointInfo.get_moshi = get_moshi
    try:
        yield handed
    finally:
        CheckpointInfo.get_moshi = stock


def say(message: str) -> None:
    """Tell the user, where stderr is open: stdout, which `print` would take, is the program's."""
    if sys.stderr is not None:
        print(f"ttt-cache: {message}", file=sys.stderr, flush=True)


@contextmanager
def _without_cuda() -> Iterator[None]:
    """Without CUDA let `torch.cuda.synchronize` do nothing: `moshi.server` calls it anywhere."""
    if torch.cuda.is_available():
        yield
        return
    synchronize = torch.cuda.synchronize
    torch.cuda.synchronize = lambda device=None: None
    try:
        yield
    finally:
        torch.cuda.synchronize = synchronize


def _end_of(program: str) -> BaseException | None:
    """Run a program and the threads that it leaves; returns what to raise, unless it ended well."""
    before, end = threading.enumerate(), None
    for step in (partial(start, program), partial(finish_threads, before)):
        try:
            step()
        except SystemExit as error:
            end = None if error.code in (None, 0) else error
        except BaseException as error:
            _show(program, error)
            end = error if isinstance(error, KeyboardInterrupt) else SystemExit(FAILED)
    return end


def _show(program: str, error: BaseException) -> None:
    """Show an error as Python does, without our own frames."""
    frames = without_frames_of(__name__, error.__traceback__)
    if frames is None and isinstance(error, (ImportError, OSError)):  # it never started
        raise Refused(f"{program} cannot be run: {error}") from None
    sys.excepthook(type(error), error.with_traceback(frames), frames)
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        say(f"{program}: the port is in use; stop what listens there, or choose another --port")
    if not torch.cuda.is_available() and ("CUDA" in str(error) or "NVIDIA" in str(error)):
        say(f"{program} asked for CUDA, which this machine has not: give it --device cpu")
