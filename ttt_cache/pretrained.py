"""Moshi's own files, opened: what is damaged, or does not fit, is named as its user names it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo
from sentencepiece import SentencePieceProcessor

OF_MACHINE = ("allocate memory", "CUDA")  # in errors that say nothing of a file
SHOWN = 300  # characters of an error; Moshi's list every weight that is missing


@dataclass(frozen=True)
class Pretrained:
    """What `CheckpointInfo.from_hf_repo` takes, under the names of Moshi's flags.

    Attributes:
        keys: how the user names each of them, for what is said of a file.
    """

    hf_repo: str
    moshi_weight: str | None = None
    mimi_weight: str | None = None
    tokenizer: str | None = None
    lora_weight: str | None = None
    config_path: str | None = None

    keys: ClassVar[Mapping[str, str]] = {
        field: f"--{field.replace('_', '-')}"
        for field in (
            "hf_repo", "moshi_weight", "mimi_weight", "tokenizer", "lora_weight", "config_path"
        )
    }  # fmt: skip

    @property
    def config(self) -> str:
        """What the config is called in messages."""
        return self.config_path or f"config.json of {self.hf_repo}"

    def info(self) -> CheckpointInfo:
        """Moshi's own description of a checkpoint, local files or the hub's.

        Raises:
            OSError: a file is missing, or the config cannot be read.
            ValueError: the config is damaged, or it and the LoRA do not go together.
        """
        key, config = self.keys["config_path"], self.config
        for field, named in self.keys.items():
            if field != "hf_repo" and (path := getattr(self, field)) is not None:
                _check_there(named, path)
        if self.config_path is not None:
            _check_object(key, self.config_path)
        try:
            info = CheckpointInfo.from_hf_repo(
                self.hf_repo,
                moshi_weights=self.moshi_weight,
                mimi_weights=self.mimi_weight,
                tokenizer=self.tokenizer,
                config_path=self.config_path,
                lora_weights=self.lora_weight,
            )
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{key}: the mimi_config_name of {config} is not JSON: {error}"
            ) from error
        described = info.lm_config
        if described is None:  # Moshi 7B, from before there were configs
            described = {"n_q": 16, "dep_q": 8}
        for field in ("n_q", "dep_q"):
            if field not in described:
                raise ValueError(f"{key}: {config}: {field} is missing")
        self._check_lora(info, config, bool(described.get("lora")))
        return info

    def _check_lora(self, info: CheckpointInfo, config: str, wanted: bool) -> None:
        if wanted and info.lora_weights is None:
            raise ValueError(
                f"{self.keys['lora_weight']} must be given: {config} is of a model with LoRA "
                "(lora: true)"
            )
        if info.lora_weights is not None and not wanted:
            raise ValueError(
                f"{self.keys['config_path']} must be the config that goes with "
                f"{info.lora_weights}, with lora: true; {config} is of a model without LoRA"
            )

    def text_tokenizer(self, info: CheckpointInfo) -> SentencePieceProcessor:
        """The tokenizer of what `info` returned.

        Raises:
            ValueError: it is damaged.
        """
        with self._named("tokenizer", info.tokenizer, "text tokenizer"):
            return info.get_text_tokenizer()

    def mimi(self, info: CheckpointInfo, device: torch.device | str) -> MimiModel:
        """Mimi of what `info` returned.

        Raises:
            ValueError: it is damaged, or not what the config says.
        """
        with self._named("mimi_weight", info.mimi_weights, "Mimi of that config"):
            return info.get_mimi(device=device)

    def language_model(
        self, info: CheckpointInfo, device: torch.device | str, dtype: torch.dtype
    ) -> LMModel:
        """The language model, with its LoRA, if it has one, fused.

        Raises:
            ValueError: its weights are damaged, or not what the config says.
        """
        file = info.moshi_weights
        files = file if info.lora_weights is None else f"{file} or {info.lora_weights}"
        with self._named("moshi_weight", files, "Moshi of that config"):
            return info.get_moshi(device, dtype=dtype, fuse_lora=True)

    @contextmanager
    def _named(self, field: str, file: object, what: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the libraries that read these files have no common type
            if isinstance(error, RuntimeError) and any(words in str(error) for words in OF_MACHINE):
                raise
            said = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"{self.keys[field]}: {file} is damaged, or no {what}: {said[:SHOWN]}"
            ) from error


def _check_there(key: str, path: str) -> None:
    """Raise `FileNotFoundError` unless there is such a file, as far as it is of this machine."""
    if not path.startswith("hf://") and not Path(path.removeprefix("file://")).is_file():
        what = "is a folder" if Path(path).is_dir() else "is not there"
        raise FileNotFoundError(f"{key} must be a file, {path} {what}")


def _check_object(key: str, path: str) -> None:
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSON and Unicode errors alike
        raise ValueError(f"{key}: {path} is not JSON: {error}") from error
    except OSError as error:
        raise OSError(f"{key}: {path} cannot be read: {error.strerror}") from error
    if not isinstance(held, dict):
        raise ValueError(f"{key}: {path} must hold a JSON object, got {type(held).__name__}")
