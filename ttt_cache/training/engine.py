"""A training run from its YAML to its summary, on one process or many."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from moshi.models.loaders import _lm_kwargs

from ttt_cache.version import __version__

from . import identity
from .carry import Caches
from .data import LMFacts, Sessions, TokenCache, prepare
from .evaluate import Losses, arms_of, evaluate
from .export import export
from .loss import Weights
from .model import check_sessions, load
from .monitor import Observed
from .picture import draw
from .pretrained import Codec, OfRun
from .processes import accelerator_for
from .recorder import Recorder, check_installed
from .restore import read_position
from .result import BEFORE, Result
from .rundir import begin_run, begins_at, open_run
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
        RuntimeError: a loss is not finite; the steps before it are saved. Or another run is going
            on in that folder, or a package is missing; nothing has been trained.
        OSError: a file cannot be written; the checkpoints before it are whole.
    """
    return Run(settings).train()


T = TypeVar("T")


class Run:
    """One training run: its model, its data and where it is in both."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.accelerator = accelerator_for(settings)
        self.main = self.accelerator.is_main_process
        self.run_dir = Path(settings.run_dir)
        self.stages = settings.ttt_cache.stages
        self.weights = Weights(
            settings.first_codebook_weight_multiplier, settings.text_padding_weight
        )
        self.rows = settings.batch_size * settings.num_microbatches * self.accelerator.num_processes
        self.steps = [settings.steps_of(stage) for stage in self.stages]
        self.observed: dict[int, Observed] = {}
        self.before: Losses = {}
        with ExitStack() as stack:
            self._load(stack)
            self._held = stack.pop_all()

    def _load(self, stack: ExitStack) -> None:
        """Everything that is needed; nothing of an older run changes yet."""
        settings = self.settings
        self.begin = self._on_main_first(lambda: self._open(stack))
        self.position = self.begin and read_position(self.begin, self.steps)
        files = OfRun.of(settings.moshi_paths)
        info = files.info()
        device = self.accelerator.device
        self.device = device if device.type != "cpu" else torch.device("cpu")  # never "cpu:0"
        opened = files.codec(info, self.device) if self.main else None
        self.lm, self.handle = load(settings, info, self.device)
        self.lm_config = info.raw_config or _lm_kwargs
        self.facts = LMFacts.of(self.lm)
        self.data, self.eval_data = self._data(opened)
        check_sessions(settings, self.handle, max(self.data.frames))
        sets = {"train_data": self.data, "eval_data": self.eval_data}
        fingerprints = {key: s.cache.fingerprint for key, s in sets.items() if s is not None}
        self.sources = identity.sources(settings, info, fingerprints)
        if self.position is not None:
            identity.check_same(self.position["made_from"], self.sources, self.run_dir)

    def _open(self, stack: ExitStack) -> Path | None:
        if not self.main:
            return begins_at(self.settings)
        check_installed(self.settings.wandb.model_dump())
        return open_run(self.settings, self.rows, stack)

    def _on_main_first(self, make: Callable[[], T]) -> T:
        """What `make` gives on the main process, then on the others, which find it done."""
        with self.accelerator.main_process_first():
            return make()

    def _data(self, opened: Codec | None) -> tuple[Sessions, Sessions | None]:
        given, cache = self.settings.data, self.settings.ttt_cache
        folder = Path(cache.codes_dir or self.run_dir / "codes")
        least = round(cache.session_sec * FRAME_RATE)

        def tokenised(manifest: str, name: str) -> TokenCache:
            if opened is None:
                return TokenCache.open(folder / name)
            return prepare(Path(manifest), folder / name, *opened, self.facts)

        def sessions(manifest: str, name: str) -> Sessions:
            return Sessions(self._on_main_first(lambda: tokenised(manifest, name)), least)

        return (
            sessions(given.train_data, "train"),
            sessions(given.eval_data, "eval") if given.eval_data else None,
        )

    def train(self) -> Path:
        """Train what is left, once; a run that begins removes what it overwrites."""
        with self._held:
            if self.position is None and self.main:
                begin_run(self.settings, self.rows)
            with self._recorder() as self.recorder:
                self._go_on()
        return self.run_dir

    def _go_on(self) -> None:
        if self.position is None:
            self.before = self.evaluate()
        else:
            self.before = self.position["before"]
            observed = self.position["observed"]
            self.observed = {int(n): Observed(**of) for n, of in observed.items()}
        self._stages(self.position)
        self._finish()

    def _recorder(self) -> Recorder:
        done = 0
        if self.position is not None:  # a step that was not fully reported is reported again
            done = self.position["step"] - (self.position["unreported"] is not None)
        return Recorder(
            self.run_dir,
            sum(self.steps),
            done,
            wandb=self.settings.wandb.model_dump(),
            config=self.settings.model_dump(mode="json"),
            main=self.main,
        )

    def _stages(self, position: dict[str, Any] | None) -> None:
        for index in range(0 if position is None else position["stage"], len(self.steps)):
            here = position if position is not None and index == position["stage"] else None
            self._stage(index, sum(self.steps[:index]), here)
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
