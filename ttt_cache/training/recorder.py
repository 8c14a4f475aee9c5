"""Where the figures of a training run go: files, TensorBoard, W&B, and a person's eyes."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from ttt_cache.files import write_whole

from .bar import Bar
from .board import board, summary_writer
from .metrics import NAME, append, read_metrics, truncate

__all__ = ["Recorder", "read_metrics"]

WANDB_ID = "wandb_id.txt"  # of the run that a resumed one goes on with


class Recorder:
    """Records the figures of every step; a context manager.

    `run_dir/metrics.jsonl` always has every step that was logged, after any kill; the same goes to
    `run_dir/tensorboard`, to a progress bar on standard error and, if asked for, to W&B.

    Args:
        run_dir: folder of the run; made if it is not there.
        total_steps: steps of the whole run.
        first_step: steps that were made before, of the checkpoint that is resumed. Later ones are
            made again, so they are dropped from `metrics.jsonl` and hidden in TensorBoard; with 0
            that is everything.
        wandb: `project`, `run_name`, `offline` and `key`, as in moshi-finetune; W&B is used if
            there is a project.
        config: settings of the run, kept in TensorBoard and W&B. Its block `wandb` is left out,
            since that may hold a key.
        main: whether this process records; elsewhere everything here does nothing.

    Raises:
        RuntimeError: TensorBoard is not installed, or W&B is asked for and is not.
        ValueError: `metrics.jsonl` is damaged; the message names file and line.
        Nothing has changed when something is refused.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        first_step: int = 0,
        wandb: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        main: bool = True,
    ) -> None:
        self.run_dir, self.path = run_dir, run_dir / NAME
        self.total_steps, self.first_step, self.main = total_steps, first_step, main
        self.wandb = dict(wandb or {})
        self.config = {name: value for name, value in (config or {}).items() if name != "wandb"}
        self._open = ExitStack()
        if not main:
            return
        check_installed(self.wandb)
        if self.path.exists():
            read_metrics(self.path)

    def __enter__(self) -> Recorder:
        if self.main:
            with ExitStack() as stack:
                self._begin(stack)
                self._open = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def _begin(self, stack: ExitStack) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            truncate(self.path, self.first_step)
        # TensorBoard hides what older files say of this step and later.
        again = self.first_step + 1 if self.first_step else 0
        settings = json.dumps(self.config, indent=2, default=str)
        self._board = stack.enter_context(board(self.run_dir, again))
        self._board.text("config", f"```\n{settings}\n```", self.first_step)
        self._wandb_run = self._wandb_begin(_wandb(), stack) if self.wandb.get("project") else None
        self._bar = stack.enter_context(Bar(self.total_steps, self.first_step))

    def _wandb_begin(self, wandb: ModuleType, stack: ExitStack) -> Any:
        offline, path = bool(self.wandb.get("offline")), self.run_dir / WANDB_ID
        if self.wandb.get("key") and not offline:
            wandb.login(key=self.wandb["key"])
        same = path.read_text(encoding="utf-8") if self.first_step and path.exists() else None
        run = wandb.init(
            project=self.wandb["project"],
            name=self.wandb.get("run_name") or self.run_dir.resolve().name,
            dir=str(self.run_dir),
            config=self.config,
            mode="offline" if offline else "online",
            id=same,
            resume="allow" if same else None,
        )
        # Tells W&B of an exception: its exit code is not 0 then.
        stack.push(lambda kind, error, trace: run.finish(exit_code=int(kind is not None)))
        write_whole({path: lambda temporary: temporary.write_text(run.id, encoding="utf-8")})
        return run

    def log(self, step: int, figures: Mapping[str, float], stage: str) -> None:
        """Record a step. A step may be logged in parts, such as its training and an evaluation.

        Log everything of a step before its checkpoint is written: what is logged after that is
        missing if the run is killed in between and resumed.

        Args:
            step: optimizer steps made so far: 1 after the first one.
            figures: numbers by name; those of layers are named `gate/25`, those of an evaluation
                `eval/loss`. What is not finite is `null` in the file.
            stage: what is trained.

        Raises:
            TypeError: a figure is not a number.
            OSError: the disk is full; the error names the file or folder.
        """
        if not self.main:
            return
        record = append(self.path, step, stage, figures)
        numbers = {n: math.nan if record[n] is None else record[n] for n in figures}
        self._board.log(step, numbers)
        if self._wandb_run is not None:
            self._wandb_run.log({"stage": stage} | numbers, step=step)
        self._bar.update(step, stage, numbers)

    def sync(self) -> None:
        """Wait until what was logged is on the disk, before a checkpoint that relies on it."""
        if self.main and self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())


def check_installed(wandb: Mapping[str, Any]) -> None:
    """Raise `RuntimeError` if TensorBoard, or W&B where there is a project, cannot be imported."""
    summary_writer()
    if wandb.get("project"):
        _wandb()


def _wandb() -> ModuleType:
    try:
        module = importlib.import_module("wandb")
    except ImportError as error:
        raise RuntimeError(
            f"wandb.project is given, and wandb cannot be imported ({error}): "
            "pip install wandb, or leave wandb.project out"
        ) from error
    if not hasattr(module, "init"):  # a folder of that name, such as W&B itself leaves behind
        raise RuntimeError(
            f"wandb.project is given, and wandb is not the package but {module.__path__}: "
            "pip install wandb, or leave wandb.project out"
        )
    return module
