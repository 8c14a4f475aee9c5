"""A training run from its YAML to its summary, on one process or many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType
from moshi.models.loaders import CheckpointInfo, _lm_kwargs

from ttt_cache.version import __version__

from . import checkpoint
from .carry import Caches
from .data import LMFacts, Sessions, TokenCache, prepare
from .evaluate import Losses, arms_of, evaluate
from .export import export
from .loss import Weights
from .model import check_learns, checkpoint_info, load
from .monitor import Observed
from .picture import draw
from .recorder import Recorder
from .result import BEFORE, Result
from .rundir import begins_at, open_run
from .settings import FRAME_RATE, Settings
from .stage import StageRun
from .summary import summarise


def train(settings: Settings) -> Path:
    """Train what the stages say; goes on from the last checkpoint of `run_dir` if there is one.

    Returns:
        the run's folder.

    Raises:
        FileNotFoundError, ValueError: something that the settings name is missing or does not fit;
            nothing has been trained.
        RuntimeError: a loss is not finite; the steps before it are saved.
        OSError: a file cannot be written; the checkpoints before it are whole.
    """
    return Run(settings).train()


T = TypeVar("T")


class Run:
    """One training run: its model, its data and where it is in both."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        mixed = "bf16" if settings.param_dtype == "bfloat16" else "no"
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        # Said outright: else accelerate takes processes on CPUs for strangers to each other.
        cpu = not torch.accelerator.is_available()
        self.accelerator = Accelerator(cpu=cpu, mixed_precision=mixed, kwargs_handlers=[unused])
        if self.accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError(
                "accelerate is set to FSDP, which is not supported: choose data parallelism (DDP), "
                "or train inside moshi-finetune (docs/finetune.md)"
            )
        self.main = self.accelerator.is_main_process
        self.run_dir = Path(settings.run_dir)
        self.stages = settings.ttt_cache.stages
        self.weights = Weights(
            settings.first_codebook_weight_multiplier, settings.text_padding_weight
        )
        self.rows = settings.batch_size * settings.num_microbatches * self.accelerator.num_processes
        self.begin = self._on_main_first(
            lambda: open_run(settings, self.rows) if self.main else begins_at(self.run_dir)
        )
        info = checkpoint_info(settings.moshi_paths)
        device = self.accelerator.device
        self.device = device if device.type != "cpu" else torch.device("cpu")  # never "cpu:0"
        self.lm, self.handle = load(settings, info, self.device)
        self.lm_config = info.raw_config or _lm_kwargs
        self.facts = LMFacts.of(self.lm)
        self.data, self.eval_data = self._data(info)
        check_learns(settings, self.handle, max(self.data.frames))
        self.observed: dict[int, Observed] = {}
        self.before: Losses = {}

    def _on_main_first(self, make: Callable[[], T]) -> T:
        """What `make` gives on the main process, then on the others, which find it done."""
        with self.accelerator.main_process_first():
            return make()

    def _data(self, info: CheckpointInfo) -> tuple[Sessions, Sessions | None]:
        given, cache = self.settings.data, self.settings.ttt_cache
        folder = Path(cache.codes_dir or self.run_dir / "codes")
        least = round(cache.session_sec * FRAME_RATE)

        def tokenised(manifest: str, name: str) -> TokenCache:
            if not self.main:
                return TokenCache.open(folder / name)
            mimi = info.get_mimi(device=self.device)
            tokenizer = info.get_text_tokenizer()
            return prepare(Path(manifest), folder / name, mimi, tokenizer, self.facts)

        def sessions(manifest: str, name: str) -> Sessions:
            return Sessions(self._on_main_first(lambda: tokenised(manifest, name)), least)

        return (
            sessions(given.train_data, "train"),
            sessions(given.eval_data, "eval") if given.eval_data else None,
        )

    def train(self) -> Path:
        position = None if self.begin is None else checkpoint.read_position(self.begin)
        done = 0 if position is None else position["step"]
        total = sum(self.settings.steps_of(stage) for stage in self.stages)
        with Recorder(
            self.run_dir,
            total,
            done,
            wandb=self.settings.wandb.model_dump(),
            config=self.settings.model_dump(mode="json"),
            main=self.main,
        ) as self.recorder:
            if position is None:
                self.before = self.evaluate()
            else:
                self.before = position["before"]
                self.observed = {int(n): Observed(**of) for n, of in position["observed"].items()}
            self._stages(position)
            self._finish()
        return self.run_dir

    def _stages(self, position: dict[str, Any] | None) -> None:
        steps = [self.settings.steps_of(stage) for stage in self.stages]
        for index in range(0 if position is None else position["stage"], len(steps)):
            here = position if position is not None and index == position["stage"] else None
            self._stage(index, sum(steps[:index]), here)
            self.accelerator.free_memory()  # it would hold on to every stage's optimizer

    def _stage(self, index: int, before: int, position: dict[str, Any] | None) -> None:
        stage = StageRun(self, index, before)
        if position is not None:
            assert self.begin is not None
            stage.resume(self.begin, position)
        stage.train()

    def evaluate(self, caches: Caches | None = None) -> Losses:
        """The losses on the held-out sessions, none without them; `caches`: of another arm."""
        if self.eval_data is None:
            return {}
        frames = max(self.settings.frames_of(stage, 0) for stage in self.stages)
        parts = (self.accelerator, self.lm, self.handle, self.eval_data)
        return evaluate(*parts, frames, self.weights, caches)

    def _finish(self) -> None:
        """Weights as users share them, the picture, and the page that sums the run up."""
        arms: dict[str, Losses] = {}
        if self.eval_data is not None:
            arms = {name: self.evaluate(caches) for name, caches in arms_of(self.handle).items()}
            arms[BEFORE] = self.before
        if not self.main:
            return
        export(self.lm, self.settings, self.lm_config, self.run_dir)
        draw(self.run_dir)
        trained = tuple(stage.train for stage in self.stages)
        adapted = self.settings.ttt_cache.adapter is not None
        result = Result(arms, self.observed, self.handle.config, trained, adapted)
        summarise(self.run_dir, result, self._facts())

    def _facts(self) -> dict[str, str]:
        cache, paths = self.settings.ttt_cache, self.settings.moshi_paths
        stages = [f"{s.train} {self.settings.steps_of(s)} steps" for s in self.stages]
        settings = ", ".join(f"{name}={value}" for name, value in cache.patch.items())
        adapter = cache.adapter and f"that of {cache.adapter}"
        return {
            "model": paths.moshi_path or paths.hf_repo_id,
            "patch": adapter or settings or "the defaults",
            "stages": ", ".join(stages),
            "data": self.settings.data.train_data,
            "processes": str(self.accelerator.num_processes),
            "device": str(self.device),
            "seed": str(self.settings.seed),
            "versions": f"torch {torch.__version__}, ttt-cache {__version__}",
        }
