"""The testbed's files, in Moshi's own formats: what is shipped, and how it is written and read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo
from safetensors.torch import save_file
from sentencepiece import SentencePieceProcessor

from ttt_cache.checks import one_of
from ttt_cache.files import write_whole

from .model import CONFIG
from .text import tokenizer_model

FOLDER = Path(__file__).parents[1] / "data" / "testbed"
CONFIG_NAME, WEIGHTS_NAME, TOKENIZER_NAME = "config.json", "model.safetensors", "tokenizer.model"
# The codes are generated, not a codec's, so there is no Mimi. Moshi's loaders want a name, and
# look for a file of that name only when they are asked for a Mimi.
NO_MIMI = "file://there-is-no-mimi-the-codes-are-generated"


def checkpoint(folder: Path = FOLDER) -> CheckpointInfo:
    """Moshi's own description of the testbed; its `get_mimi` raises, since there is none."""
    return CheckpointInfo.from_hf_repo(
        "local files only",
        moshi_weights=folder / WEIGHTS_NAME,
        tokenizer=folder / TOKENIZER_NAME,
        config_path=folder / CONFIG_NAME,
    )


def load(device: torch.device | str = "cpu") -> LMModel:
    """The shipped Moshi in float32, ready to generate."""
    return checkpoint().get_moshi(device, dtype=torch.float32)


def tokenizer() -> SentencePieceProcessor:
    """What turns text tokens into words."""
    return checkpoint().get_text_tokenizer()


def adapter(name: str) -> Path:
    """The folder of a shipped adapter, for `ttt_cache.load_adapter`.

    Raises:
        ValueError: there is none of that name; those that there are are listed.
    """
    folder = FOLDER / "adapters"
    return folder / one_of("name", name, tuple(sorted(path.name for path in folder.iterdir())))


def write(model: LMModel, folder: Path, made: dict[str, Any]) -> None:
    """Write a trained testbed, all files or none.

    Args:
        made: how it was trained: JSON values, kept beside the weights and in the config.
    """
    config = CONFIG | {
        "model_type": "moshi",
        "moshi_name": WEIGHTS_NAME,
        "mimi_name": NO_MIMI,
        "tokenizer_name": TOKENIZER_NAME,
        "model_id": {"name": "ttt_cache testbed", **made},
    }
    text = json.dumps(config, indent=2) + "\n"
    metadata = {name: json.dumps(value) for name, value in made.items()}
    words = tokenizer_model()
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(
        {
            folder / CONFIG_NAME: lambda path: path.write_text(text, encoding="utf-8"),
            folder / WEIGHTS_NAME: lambda path: save_file(model.state_dict(), path, metadata),
            folder / TOKENIZER_NAME: lambda path: path.write_bytes(words),
        }
    )
