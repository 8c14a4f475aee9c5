"""What a run leaves for its users: files that Moshi's loaders and `load_adapter` read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.modules.lora import replace_lora_with_linear
from safetensors.torch import save_file

from ttt_cache.adapter import save_adapter
from ttt_cache.files import write_whole
from ttt_cache.patched import SLOT

from .checkpoint import ADAPTER
from .model import is_embedding
from .settings import Settings

WEIGHTS, LORA, CONFIG = "model.safetensors", "lora.safetensors", "config.json"
OF_LORA = ("lora", "lora_rank", "lora_scaling", "lora_name")  # keys of Moshi's config


def export(lm: LMModel, settings: Settings, lm_config: dict[str, Any], run_dir: Path) -> None:
    """Write the adapter, and Moshi's weights if they were trained. The end of `lm` as it was: LoRA
    may be fused.

    The config says nothing of a LoRA that `lm` was loaded with: it is fused in `lm`.

    `adapter/` is read by `ttt_cache.load_adapter`. Beside it stand, if Moshi was trained, a
    `config.json` and `lora.safetensors`, or with `save_adapters: false` or without LoRA the whole
    `model.safetensors`, as moshi's loaders read them.
    """
    paths = settings.moshi_paths
    save_adapter(lm, run_dir / ADAPTER, paths.moshi_path or paths.hf_repo_id)
    if not settings.tunes_moshi:
        return
    lora, dtype = settings.lora, getattr(torch, settings.param_dtype)
    apart = settings.keeps_lora
    if not apart:
        replace_lora_with_linear(lm)
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in lm.state_dict().items()
        if (_of_lora(name, lora.ft_embed) if apart else f".{SLOT}." not in name)
    }
    config = {key: value for key, value in lm_config.items() if key not in OF_LORA}
    weights = WEIGHTS
    if apart:
        weights = LORA
        config |= {"lora": True, "lora_rank": lora.rank, "lora_scaling": lora.scaling}
    text = json.dumps(config, indent=2) + "\n"
    write_whole(
        {
            run_dir / weights: lambda path: save_file(tensors, path),
            run_dir / CONFIG: lambda path: path.write_text(text, encoding="utf-8"),
        }
    )


def _of_lora(name: str, with_embeddings: bool) -> bool:
    """Whether a tensor goes into `lora.safetensors`."""
    return ".lora_A." in name or ".lora_B." in name or (with_embeddings and is_embedding(name))
