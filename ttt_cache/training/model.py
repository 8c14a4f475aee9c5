"""The model of a run: loaded as Moshi loads it, patched, and the part of it that is trained."""

from __future__ import annotations

import math
import os

import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo
from moshi.modules.lora import LoRALinear, replace_all_linear_with_lora
from safetensors import SafetensorError
from torch import nn

from ttt_cache.adapter import load_adapter
from ttt_cache.config import CacheConfig
from ttt_cache.patch import Patch, patch
from ttt_cache.targets import find_transformer

from .settings import Lora, Paths, Settings


def checkpoint_info(paths: Paths) -> CheckpointInfo:
    """Moshi's own description of a checkpoint, local files or the hub's."""
    return CheckpointInfo.from_hf_repo(
        paths.hf_repo_id,
        moshi_weights=paths.moshi_path,
        mimi_weights=paths.mimi_path,
        tokenizer=paths.tokenizer_path,
        config_path=paths.config_path,
    )


def load(settings: Settings, info: CheckpointInfo, device: torch.device) -> tuple[LMModel, Patch]:
    """The language model with everything frozen, LoRA if asked for, and the patch.

    Raises:
        ValueError: the checkpoint is damaged or not what its config says; `ttt_cache.patch` does
            not fit the model, or contradicts `ttt_cache.adapter`.
    """
    dtype = getattr(torch, settings.param_dtype)
    try:
        lm = info.get_moshi(device, dtype=dtype, fuse_lora=True)
    except torch.OutOfMemoryError:
        raise
    except (SafetensorError, RuntimeError, TypeError, KeyError, AssertionError) as error:
        raise ValueError(
            f"moshi_paths: {info.moshi_weights} is damaged, or no Moshi of that config: {error}"
        ) from error
    if lm.condition_provider is not None:
        raise ValueError("moshi_paths: a model with conditioners cannot be trained here yet")
    lm.requires_grad_(False)
    if settings.lora.enable:
        add_lora(lm, settings.lora, settings.seed)
    for transformer in (lm.transformer, lm.depformer):
        if transformer is not None:
            transformer.checkpointing = settings.gradient_checkpointing
    torch.manual_seed(settings.seed)
    cache = settings.ttt_cache
    if cache.adapter is None:
        return lm, patch(lm, config=CacheConfig.from_fields(cache.patch))
    if cache.patch:
        raise ValueError("ttt_cache.adapter brings its own settings; leave out ttt_cache.patch")
    return lm, load_adapter(lm, os.fspath(cache.adapter))


def check_learns(settings: Settings, handle: Patch, longest: int) -> None:
    """Refuse stages in which a memory could not learn anything.

    Args:
        longest: frames of the longest session.

    Raises:
        ValueError: the memory has no weights, or nothing ever leaves the window.
    """
    caches = handle.caches.values()
    for number, stage in enumerate(settings.ttt_cache.stages):
        if stage.train not in ("distill", "compressor"):
            continue
        if not any(True for cache in caches for _ in cache.parameters()):
            raise ValueError(
                f"ttt_cache.stages.{number}: {stage.train} trains the memory, but "
                f"memory={handle.config.memory!r} has nothing to train"
            )
        # Distillation takes every segment by itself, the other stages go through whole sessions.
        segment = settings.frames_of(stage, settings.steps_of(stage) - 1)
        key, frames = f"ttt_cache.stages.{number}.frames", min(segment, longest)
        if stage.train != "distill" or longest < segment:
            key, frames = "ttt_cache.session_sec", longest
        if not any(cache.written(torch.tensor([frames])).any() for cache in caches):
            raise ValueError(
                f"{key}: must be longer: within {frames} frames nothing leaves the window, so the "
                "memory would never be read"
            )


def add_lora(lm: LMModel, lora: Lora, seed: int) -> None:
    """Low-rank adapters (arXiv 2106.09685) beside every linear layer; new, they change nothing."""
    replace_all_linear_with_lora(lm, lora.rank, lora.scaling)
    generator = torch.Generator().manual_seed(seed)
    for module in lora_layers(lm):
        module.requires_grad_(False)
        down = module.lora_A.weight
        bound = 1 / math.sqrt(down.shape[1])  # Kaiming's, as nn.Linear's own
        drawn = torch.empty(down.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            down.copy_(drawn)
            module.lora_B.weight.zero_()


def lora_layers(module: nn.Module) -> list[LoRALinear]:
    return [m for m in module.modules() if isinstance(m, LoRALinear)]


def choose_trained(lm: LMModel, handle: Patch, settings: Settings, stage: str) -> None:
    """Let exactly what a stage trains require gradients, in float32 whatever the model's dtype.

    `distill` and `compressor` train the memory; `layers` also the patched layers, by LoRA or in
    full; `everything` the whole model likewise.
    """
    trained = list(nn.ModuleList(handle.caches.values()).parameters())
    if stage in ("layers", "everything"):
        blocks = [find_transformer(lm).layers[layer] for layer in handle.layers]
        parts = blocks if stage == "layers" else [lm]
        for part in parts:
            if settings.full_finetuning:
                trained += part.parameters()
            for layer in lora_layers(part):
                trained += [layer.lora_A.weight, layer.lora_B.weight]
        if stage == "everything" and settings.lora.ft_embed:
            trained += [p for name, p in lm.named_parameters() if is_embedding(name)]
    lm.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
        if parameter.dtype.itemsize < 4:
            parameter.data = parameter.data.float()  # bfloat16 would round the updates away
    for cache in handle.caches.values():
        if cache.anchor.dtype.itemsize < 4:
            cache.float()


def is_embedding(name: str) -> bool:
    """Whether a parameter is of Moshi's token embeddings, text, audio or the depformer's."""
    return name.split(".")[0] in ("emb", "text_emb", "depformer_emb", "depformer_text_emb")
