"""A Python program run within another one as if it had been started by itself."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

MACHINERY = {__name__, "runpy", "pkgutil", "importlib._bootstrap", "importlib._bootstrap_external"}


@contextmanager
def as_main(program: str, arguments: Sequence[str]) -> Iterator[None]:
    """`sys.argv` and `sys.path` as Python sets them for a script, or for `-m`.

    Args:
        program: as for `start`.
    """
    argv, path = sys.argv, sys.path
    folder = os.path.dirname(os.path.realpath(program)) if _is_script(program) else os.getcwd()
    sys.argv = [program, *arguments]
    sys.path = path if sys.flags.safe_path else [folder, *path]
    try:
        yield
    finally:
        sys.argv, sys.path = argv, path


def start(program: str) -> None:
    """Run a module (`python -m`), or a script: a name that ends in `.py` or holds a slash.

    Raises:
        ImportError, OSError: without a frame of the program in its traceback: there is none.
        BaseException: whatever the program raises.
    """
    if _is_script(program):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def without_frames_of(module: str, frames: TracebackType | None) -> TracebackType | None:
    """The traceback of an error that `start` raised from the program's first frame on.

    Args:
        module: whose frames are left out, before that and later.
    """
    while frames is not None and _module(frames) in MACHINERY | {module}:
        frames = frames.tb_next
    rest = frames
    while rest is not None:
        while rest.tb_next is not None and _module(rest.tb_next) == module:
            rest.tb_next = rest.tb_next.tb_next
        rest = rest.tb_next
    return frames


def _is_script(program: str) -> bool:
    return program.endswith(".py") or os.sep in program


def _module(frames: TracebackType) -> str | None:
    return frames.tb_frame.f_globals.get("__name__")
