"""Which Moshi is evaluated: the testbed, or any that Moshi's own loader opens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo, _lm_kwargs

from ttt_cache import testbed
from ttt_cache.adapter import load_adapter
from ttt_cache.checks import one_of
from ttt_cache.config import CacheConfig
from ttt_cache.testbed.stream import LEVELS
from ttt_cache.training.data import LMFacts

from .checkpoint import key_of
from .forced import require_two_codebooks
from .freerun import require_user
from .source import RecordedSource, Source, TestbedSource
from .subject import TESTBED_SETTINGS, Subject, adapter_config

REPO = "kyutai/moshiko-pytorch-bf16"  # Moshi 7B
# Levels that adapters of the testbed learn on.
LESSONS = "few", "many", "rewritten", "distant", "paused"
LEVEL = "rewritten"  # that is measured on
SAID = 300  # characters of a loader's error


@dataclass(frozen=True)
class Checkpoint:
    """Moshi's own flags. None of them given is the testbed."""

    hf_repo: str | None = None
    moshi_weight: Path | None = None
    mimi_weight: Path | None = None
    tokenizer: Path | None = None
    config_path: Path | None = None
    lora_weight: Path | None = None

    @property
    def is_testbed(self) -> bool:
        return not any(vars(self).values())

    @property
    def name(self) -> str:
        if self.is_testbed:
            return "the testbed"
        return str(self.moshi_weight or self.hf_repo or REPO)

    def require_files(self) -> None:
        """Raise `ValueError` if a file that is named is not there."""
        for name, value in vars(self).items():
            if isinstance(value, Path):
                _require_file(name, value)

    def info(self) -> CheckpointInfo:
        """What Moshi's loader makes of the flags.

        Raises:
            ValueError: files are missing, damaged, or do not go together.
        """
        if self.is_testbed:
            return testbed.checkpoint()
        files = {name: value and str(value) for name, value in vars(self).items()}
        try:
            return CheckpointInfo.from_hf_repo(
                files["hf_repo"] or REPO,
                moshi_weights=files["moshi_weight"],
                mimi_weights=files["mimi_weight"],
                tokenizer=files["tokenizer"],
                config_path=files["config_path"],
                lora_weights=files["lora_weight"],
            )
        except Exception as error:  # the loader's libraries have no common type
            raise ValueError(f"{self.name} cannot be opened: {_said(error)}") from error

    def load(self, device: torch.device, dtype: torch.dtype) -> LMModel:
        """The model, ready to be measured.

        Raises:
            ValueError: its weights are damaged, or not what the config says.
        """
        info = self.info()
        try:
            lm = info.get_moshi(device, dtype=dtype)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise ValueError(f"{self.name} cannot be loaded: {_said(error)}") from error
        return lm.eval().requires_grad_(False)


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:SAID] or type(error).__name__


@dataclass(frozen=True)
class Data:
    """What is heard.

    Attributes:
        level: of the testbed's stream.
        data, other_data: moshi-finetune's jsonl, for models that are not the testbed.
        folder: where their tokens are kept.
    """

    level: str | None
    data: Path | None
    other_data: Path | None
    folder: Path

    def require(self, is_testbed: bool) -> None:
        """Refuse what does not go together, before anything is loaded.

        Raises:
            ValueError: with the reason.
        """
        if is_testbed and (self.data or self.other_data):
            raise ValueError(
                "--data needs a model to hear it: name one, for example with --hf-repo"
            )
        if not is_testbed and self.data is None:
            raise ValueError("--data must be given: recordings for a model that is not the testbed")
        if not is_testbed and self.level is not None:
            raise ValueError("--level is of the testbed's own conversations: leave it out")
        if self.level is not None:
            one_of("--level", self.level, tuple(LEVELS))
        for name, path in ("data", self.data), ("other_data", self.other_data):
            if path is not None:
                _require_file(name, path)
        if self.data and self.other_data and self.data.samefile(self.other_data):
            raise ValueError(
                f"--other-data must be recordings of another kind, got --data's {self.data}"
            )


def build(
    checkpoint: Checkpoint,
    data: Data,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    adapter: Path | None,
    settings: Mapping[str, Any],
    speaks: bool = False,
) -> Subject:
    """Load the model and open its conversations.

    Args:
        dtype: of a model that is not the testbed, which is float32.
        adapter: trained weights; its settings are those of the memory.
        settings: of the memory, in place of single defaults; none beside an adapter.
        speaks: the model is to speak beside a user, whom it has to hear.

    Raises:
        ValueError, OSError: something is missing, damaged or does not go together.
    """
    if adapter is not None and settings:
        others = ", ".join(f"--{name}" for name in settings)
        raise ValueError(f"--adapter brings its settings along: leave out {others}")
    is_testbed = checkpoint.is_testbed
    data.require(is_testbed)
    checkpoint.require_files()
    source = taught = other = None
    if is_testbed:
        level = data.level or LEVEL
        source, taught = TestbedSource(level), TestbedSource(*LESSONS)
        other = TestbedSource("dialect" if level != "dialect" else LEVEL)
    given = {**(TESTBED_SETTINGS if is_testbed else {}), **settings}
    if adapter is not None:
        given = {n: v for n, v in adapter_config(adapter).to_json().items() if n != "preset"}
    _require_fit(CacheConfig.from_fields(given), checkpoint)
    lm = checkpoint.load(device, torch.float32 if is_testbed else dtype)
    if adapter is not None:
        load_adapter(lm, adapter).remove()  # one of another model is refused now, not hours later
    require_two_codebooks(lm)
    if speaks:
        require_user(lm)
    if source is None:
        assert data.data is not None
        source, other = _recorded(checkpoint, lm, data, device)
    return Subject(lm, checkpoint.name, source, taught, other, given, adapter, is_testbed, seed)


def _require_file(name: str, path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"--{name.replace('_', '-')} must be a file, and {path} is none")


def _require_fit(config: CacheConfig, checkpoint: Checkpoint) -> None:
    """Raise `ValueError` if a window is longer than the model's context, by its config alone; as
    `ttt_cache.patch` does, which knows the layers, and of settings by layer is the judge."""
    context = (checkpoint.info().lm_config or _lm_kwargs).get("context")
    if context is None or not isinstance(config.recent, int):
        return
    most = context - (config.window.capacity - config.recent)
    if most < 1:
        raise ValueError(f"--chunk must be within the context of {context}, got {config.chunk}")
    if config.recent > most:
        raise ValueError(
            f"--recent must be at most {most}, the model's context of {context} less the frames "
            f"that wait for a chunk of {config.chunk}; got {config.recent}"
        )


def _recorded(
    checkpoint: Checkpoint, lm: LMModel, data: Data, device: torch.device
) -> tuple[Source, Source | None]:
    info, facts = checkpoint.info(), LMFacts.of(lm)
    try:
        mimi, tokenizer = info.get_mimi(device=device), info.get_text_tokenizer()
    except Exception as error:
        raise ValueError(f"Mimi or the tokenizer cannot be loaded: {_said(error)}") from error

    def tokenised(manifest: Path) -> Source:
        key = key_of({"manifest": str(manifest.resolve()), "model": checkpoint.name})
        return RecordedSource.prepare(manifest, data.folder / key, mimi, tokenizer, facts)

    assert data.data is not None
    return tokenised(data.data), data.other_data and tokenised(data.other_data)
