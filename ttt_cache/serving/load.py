"""The model to be served, loaded as `moshi.server` loads it."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from moshi.models.compression import MimiModel
from moshi.models.lm import LMGen, LMModel
from moshi.run_inference import get_condition_tensors, seed_all

from ..launch import Install, handed_out
from ..pretrained import Pretrained
from .room import check_room
from .sampling import check_lm_gen_config

if TYPE_CHECKING:
    import sentencepiece

SEED = 42424242  # moshi.server's


@dataclass(frozen=True)
class Files(Pretrained):
    """What Moshi's flags of these names say."""

    cfg_coef: float = 1.0
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16

    def absolute(self) -> Files:
        """The same, for a process with another working directory."""
        names = ("moshi_weight", "mimi_weight", "tokenizer", "lora_weight", "config_path")
        return replace(self, **{name: absolute(getattr(self, name)) for name in names})


def absolute(path: str | None) -> str | None:
    """A path that is there as an absolute one; else it is of a repository."""
    return path if path is None or not os.path.exists(path) else os.path.abspath(path)


@dataclass
class Loaded:
    """LMGen (not streaming yet), Mimi, the tokenizer of the text, and the least bytes of a row."""

    gen: LMGen
    mimi: MimiModel
    tokenizer: sentencepiece.SentencePieceProcessor
    row_bytes: int


@torch.no_grad()
def load(files: Files, install: Install, rows: int) -> Loaded:
    """Load a model with a cache in it, for `rows` conversations.

    Raises:
        OSError: files are missing.
        ValueError: files are damaged, the model cannot be batched, or there is no memory for
            so many conversations.
        ttt_cache.launch.Refused: the cache does not fit.
    """
    seed_all(SEED)
    info = files.info()
    options = check_lm_gen_config(
        f"{files.keys['config_path']}: {files.config}", info.lm_gen_config
    )
    mimi = files.mimi(info, files.device)
    tokenizer = files.text_tokenizer(info)
    with handed_out(install, device_given=True) as handed:  # what is not there was refused
        try:
            lm = files.language_model(info, files.device, files.dtype)
        except SystemExit:
            raise handed.refused[-1] from None
    row_bytes = check_room(rows, lm)
    gen = _generator(info.model_type, options, lm, files.cfg_coef, rows)
    return Loaded(gen, mimi, tokenizer, row_bytes)


def _generator(
    model_type: str, options: dict[str, Any], lm: LMModel, cfg_coef: float, rows: int
) -> LMGen:
    """LMGen with conditions for every row.

    Raises:
        ValueError: rows cannot have their own state, or there are no conditions for them.
    """
    try:
        conditions = get_condition_tensors(model_type, lm, rows, cfg_coef)
    except RuntimeError as error:
        raise ValueError(f"the model cannot be batched: {error}") from None
    if cfg_coef != 1 and not conditions:
        raise ValueError(
            f"--cfg-coef must be 1 for a model without conditions to guide it, got {cfg_coef:g}"
        )
    masked = options.get("cfg_is_masked_until")
    if masked is not None and len(masked) not in (1, rows):
        raise ValueError(
            f"the model cannot be batched: cfg_is_masked_until must name 1 or {rows} rows, "
            f"got {len(masked)}"
        )
    options |= {"support_out_of_sync": True}
    return LMGen(lm, cfg_coef=cfg_coef, condition_tensors=conditions, **options)
