"""The model of a run: loaded as Moshi loads it, patched, and the part of it that is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo
from moshi.modules.lora import LoRALinear, replace_all_linear_with_lora
from torch import nn

from ttt_cache.adapter import load_adapter, locate
from ttt_cache.config import CacheConfig
from ttt_cache.patch import Patch, patch
from ttt_cache.targets import find_transformer

from .masters import widen
from .pretrained import OfRun
from .settings import Lora, Settings


def load(settings: Settings, info: CheckpointInfo, device: torch.device) -> tuple[LMModel, Patch]:
    """The language model with everything frozen, LoRA if asked for, and the patch.

    Raises:
        ValueError: the checkpoint is damaged or not what its config says; `ttt_cache.patch` or
            `ttt_cache.adapter` does not fit the model; a stage could not teach the memory anything;
            a LoRA would be kept apart from that of the checkpoint.
    """
    cache = settings.ttt_cache
    if info.lora_weights is not None and settings.keeps_lora:
        raise ValueError(
            f"save_adapters must be false: {info.lora_weights} is fused into the model, and a new "
            "LoRA apart from it would be of a model that is nowhere written"
        )
    if cache.adapter is not None:
        with _named_adapter():
            locate(cache.adapter)  # before the minutes that a model takes to load
    dtype = getattr(torch, settings.param_dtype)
    lm = OfRun.of(settings.moshi_paths).language_model(info, device, dtype)
    lm.requires_grad_(False)
    if settings.lora.enable:
        add_lora(lm, settings.lora, settings.seed)
    for transformer in (lm.transformer, lm.depformer):
        if transformer is not None:
            transformer.checkpointing = settings.gradient_checkpointing
    torch.manual_seed(settings.seed)
    if cache.adapter is None:
        handle = patch(lm, config=CacheConfig.from_fields(cache.patch))
    else:
        with _named_adapter():
            handle = load_adapter(lm, cache.adapter)
    _check_learns(settings, handle)
    return lm, handle


@contextmanager
def _named_adapter() -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"ttt_cache.adapter: {error}") from error


def _check_learns(settings: Settings, handle: Patch) -> None:
    """Refuse stages in which a memory could not learn anything, whatever the data.

    What a frame leaves in the memory gets a gradient only if the frame arrives, leaves the window
    and is read within one segment: gradients stop between segments.
    """
    for number, stage in enumerate(settings.ttt_cache.stages):
        if _has_weights(handle):
            _check_reads(handle, *_longest_segment(settings, number))
        elif stage.train in ("distill", "compressor"):
            raise ValueError(
                f"ttt_cache.stages.{number}: {stage.train} trains the memory, but "
                f"memory={handle.config.memory!r} has nothing to train"
            )


def check_sessions(settings: Settings, handle: Patch, longest: int) -> None:
    """Refuse sessions that are too short for the memory to be read, or for the segments.

    Args:
        longest: frames of the longest session.

    Raises:
        ValueError: nothing ever leaves the window, or a segment is longer than every session.
    """
    if _has_weights(handle):
        _check_reads(handle, "ttt_cache.session_sec", longest)
    for number in range(len(settings.ttt_cache.stages)):
        key, segment = _longest_segment(settings, number)
        if segment > longest:
            raise ValueError(
                f"{key}: a segment of {segment} frames would be padding beyond {longest}, the "
                "longest session: shorten it, or raise ttt_cache.session_sec"
            )


def _longest_segment(settings: Settings, number: int) -> tuple[str, int]:
    """Of a stage: the key that says it, and its frames."""
    stage = settings.ttt_cache.stages[number]
    key = f"ttt_cache.stages.{number}.frames" if stage.frames else "duration_sec"
    return key, max(settings.lengths_of(stage))


def _has_weights(handle: Patch) -> bool:
    return any(True for cache in handle.caches.values() for _ in cache.parameters())


def _check_reads(handle: Patch, key: str, frames: int) -> None:
    if not any(cache.written(torch.tensor([frames])).any() for cache in handle.caches.values()):
        raise ValueError(
            f"{key}: must be longer: within {frames} frames nothing leaves the window and is read, "
            "so the memory would not learn what to keep"
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
            parameter.data = parameter.data.float()
    widen(handle)


def is_embedding(name: str) -> bool:
    """Whether a parameter is of Moshi's token embeddings, text, audio or the depformer's."""
    return name.split(".")[0] in ("emb", "text_emb", "depformer_emb", "depformer_text_emb")
