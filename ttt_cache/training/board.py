"""TensorBoard's files, whose errors name them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAME = "tensorboard"


class Board:
    """Writes figures to `run_dir/tensorboard`; made within `board`.

    Args:
        run_dir: folder of the run.
        first_step: what older files say of this step and later is hidden.

    Raises:
        OSError: from every method, if the disk is full; the error names the folder.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        self.path = run_dir / NAME
        with self._naming():
            self._writer = summary_writer()(str(self.path), purge_step=first_step)

    def text(self, name: str, text: str, step: int) -> None:
        with self._naming():
            self._writer.add_text(name, text, step)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        with self._naming():
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        with self._naming():
            self._writer.close()

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(self.path)) from error


@contextmanager
def board(run_dir: Path, first_step: int) -> Iterator[Board]:
    """A `Board`, closed at the end. TensorBoard writes in a thread, whose error the next call
    raises; here it is not also printed with a traceback."""
    told = threading.excepthook

    def tell(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            told(args)

    threading.excepthook = tell
    try:
        made = Board(run_dir, first_step)
        try:
            yield made
        finally:
            made.close()
    finally:
        threading.excepthook = told


def summary_writer() -> Any:
    """TensorBoard's writer; raises `RuntimeError` if it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RuntimeError(
            f"training writes TensorBoard logs, and TensorBoard cannot be imported ({error}): "
            "pip install 'ttt-cache[train]'"
        ) from error
    return SummaryWriter
