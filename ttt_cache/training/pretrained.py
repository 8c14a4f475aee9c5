"""Moshi's own files, as the YAML of a run names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo
from sentencepiece import SentencePieceProcessor

from ..pretrained import Pretrained
from .data import LMFacts
from .settings import Paths

Codec = tuple[MimiModel, SentencePieceProcessor]


class OfRun(Pretrained):
    """The files of a run's `moshi_paths`, for models that can be trained."""

    keys: ClassVar[Mapping[str, str]] = {
        "hf_repo": "moshi_paths.hf_repo_id",
        "moshi_weight": "moshi_paths.moshi_path",
        "mimi_weight": "moshi_paths.mimi_path",
        "tokenizer": "moshi_paths.tokenizer_path",
        "config_path": "moshi_paths.config_path",
        "lora_weight": "moshi_paths.lora_path",
    }

    @classmethod
    def of(cls, paths: Paths) -> OfRun:
        """What a YAML says."""
        given = paths.model_dump()
        return cls(**{field: given[key.partition(".")[2]] for field, key in cls.keys.items()})

    def codec(self, info: CheckpointInfo, device: torch.device) -> Codec:
        """Mimi and the text tokenizer.

        Raises:
            ValueError: one of them is damaged, or not what the config says.
        """
        tokenizer = self.text_tokenizer(info)
        return self.mimi(info, device), tokenizer

    def language_model(
        self, info: CheckpointInfo, device: torch.device | str, dtype: torch.dtype
    ) -> LMModel:
        """The language model, with its LoRA, if it has one, fused.

        Raises:
            ValueError: its weights are damaged, not what the config says, or of a model that cannot
                be trained.
        """
        lm = super().language_model(info, device, dtype)
        if lm.condition_provider is not None:
            raise ValueError("moshi_paths: a model with conditioners cannot be trained here yet")
        try:
            LMFacts.of(lm)
        except ValueError as error:
            raise ValueError(f"moshi_paths: {error}") from error
        return lm
