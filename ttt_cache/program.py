"""A Python program run within another one as if it had been started by itself."""

from __future__ import annotations

import gc
import io
import os
import pkgutil
import runpy
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from types import ModuleType, TracebackType

MACHINERY = {__name__, "runpy", "pkgutil", "importlib._bootstrap", "importlib._bootstrap_external"}


@contextmanager
def as_main(program: str, arguments: Sequence[str]) -> Iterator[None]:
    """`sys.argv` and `sys.path` as Python sets them for a script, or for `-m`; meanwhile
    `__main__` may be replaced.

    Args:
        program: as for `start`.
    """
    argv, path, main = sys.argv, sys.path, sys.modules["__main__"]
    folder = os.path.dirname(os.path.realpath(program)) if _is_script(program) else os.getcwd()
    sys.argv = [program, *arguments]
    sys.path = path if sys.flags.safe_path else [folder, *path]
    try:
        yield
    finally:
        sys.argv, sys.path, sys.modules["__main__"] = argv, path, main


def start(program: str) -> None:
    """Run a module (`python -m`), or a script: a name that ends in `.py` or holds a slash.

    Raises:
        ImportError, OSError: without a frame of the program in its traceback: there is none.
        BaseException: whatever the program raises.
    """
    if not _is_script(program):
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    elif program.endswith(".pyc") or pkgutil.get_importer(program):  # or a folder, or a ZIP
        runpy.run_path(program, run_name="__main__")
    else:
        _run_source(os.path.abspath(program))


def finish_threads(before: Collection[threading.Thread]) -> None:
    """Wait for a program's threads as Python does after its last line, daemons left out.

    Executors take no more work then, else their idle threads would be waited for without end.

    Args:
        before: threads that are not the program's.
    """
    while left := [t for t in threading.enumerate() if not t.daemon and t not in before]:
        _close_executors()
        left[0].join()


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


def _run_source(path: str) -> None:
    """Run a script of that absolute path, which Python makes `__file__`, and leave it `__main__`:
    threads may need it yet. `runpy.run_path` would make it `sys.argv[0]`, too, which Python does
    not."""
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    main = sys.modules["__main__"] = ModuleType("__main__")
    main.__dict__.update(__file__=path, __cached__=None)
    exec(code, main.__dict__)


def _close_executors() -> None:
    """What was submitted is still done."""
    for held in gc.get_objects():
        if issubclass(type(held), Executor):
            held.shutdown(wait=False)


def _is_script(program: str) -> bool:
    return program.endswith(".py") or os.sep in program


def _module(frames: TracebackType) -> str | None:
    return frames.tb_frame.f_globals.get("__name__")
