"""Moshi's own files, opened: what is damaged, or does not go together, is named by its key."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo
from sentencepiece import SentencePieceProcessor

from .data import LMFacts
from .settings import Paths

Codec = tuple[MimiModel, SentencePieceProcessor]

OF_MACHINE = ("allocate memory", "CUDA")  # in errors that say nothing of a file
SHOWN = 300  # characters of an error; Moshi's list every weight that is missing


def checkpoint_info(paths: Paths) -> CheckpointInfo:
    """Moshi's own description of a checkpoint, local files or the hub's.

    Raises:
        ValueError: the config is damaged, or it and the LoRA do not go together.
    """
    config = paths.config_path or f"config.json of {paths.hf_repo_id}"
    if paths.config_path is not None:
        _check_object(paths.config_path)
    try:
        info = CheckpointInfo.from_hf_repo(
            paths.hf_repo_id,
            moshi_weights=paths.moshi_path,
            mimi_weights=paths.mimi_path,
            tokenizer=paths.tokenizer_path,
            config_path=paths.config_path,
            lora_weights=paths.lora_path,
        )
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"moshi_paths.config_path: the mimi_config_name of {config} is not JSON: {error}"
        ) from error
    described = info.lm_config
    if described is None:  # Moshi 7B, from before there were configs
        described = {"n_q": 16, "dep_q": 8}
    for field in ("n_q", "dep_q"):
        if field not in described:
            raise ValueError(f"moshi_paths.config_path: {config}: {field} is missing")
    if described.get("lora") and info.lora_weights is None:
        raise ValueError(
            f"moshi_paths.lora_path must be given: {config} is of a model with LoRA (lora: true)"
        )
    if info.lora_weights is not None and not described.get("lora"):
        raise ValueError(
            f"moshi_paths.config_path must be the config that goes with {info.lora_weights}, with "
            f"lora: true; {config} is of a model without LoRA"
        )
    return info


def codec(info: CheckpointInfo, device: torch.device) -> Codec:
    """Mimi and the text tokenizer.

    Raises:
        ValueError: one of them is damaged, or not what the config says.
    """
    with _named("moshi_paths.tokenizer_path", info.tokenizer, "text tokenizer"):
        tokenizer = info.get_text_tokenizer()
    with _named("moshi_paths.mimi_path", info.mimi_weights, "Mimi of that config"):
        mimi = info.get_mimi(device=device)
    return mimi, tokenizer


def language_model(info: CheckpointInfo, device: torch.device, dtype: torch.dtype) -> LMModel:
    """The language model, with its LoRA, if it has one, fused.

    Raises:
        ValueError: its weights are damaged, not what the config says, or of a model that cannot be
            trained.
    """
    file = info.moshi_weights
    files = file if info.lora_weights is None else f"{file} or {info.lora_weights}"
    with _named("moshi_paths.moshi_path", files, "Moshi of that config"):
        lm = info.get_moshi(device, dtype=dtype, fuse_lora=True)
    if lm.condition_provider is not None:
        raise ValueError("moshi_paths: a model with conditioners cannot be trained here yet")
    try:
        LMFacts.of(lm)
    except ValueError as error:
        raise ValueError(f"moshi_paths: {error}") from error
    return lm


def _check_object(path: str) -> None:
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSON and Unicode errors alike
        raise ValueError(f"moshi_paths.config_path: {path} is not JSON: {error}") from error
    if not isinstance(held, dict):
        raise ValueError(
            f"moshi_paths.config_path: {path} must hold a JSON object, got {type(held).__name__}"
        )


@contextmanager
def _named(key: str, file: object, what: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the libraries that read these files have no common type
        if isinstance(error, RuntimeError) and any(words in str(error) for words in OF_MACHINE):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{key}: {file} is damaged, or no {what}: {said[:SHOWN]}") from error
