"""Whether a run that goes on reads what it began with, wherever that lies by now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moshi.models.loaders import CheckpointInfo

from ttt_cache.adapter import locate

from .settings import Settings

PIECES, PIECE = 4096, 4096  # bytes


@dataclass(frozen=True)
class Source:
    """What a run reads.

    Attributes:
        file: where it is, for messages.
        identity: what it is.
    """

    file: str
    identity: str


def sources(
    settings: Settings, info: CheckpointInfo, fingerprints: Mapping[str, Mapping[str, str]]
) -> dict[str, Source]:
    """What a run reads, by key.

    Args:
        fingerprints: of the token caches, by their keys in the block `data`. They are of Mimi and
            the text tokenizer too.
    """
    paths = settings.moshi_paths
    config = paths.config_path or f"config.json of {paths.hf_repo_id}"
    found = {
        "moshi_paths": weights(info.moshi_weights),
        "moshi_paths.config_path": described(config, info.raw_config),
    }
    if info.lora_weights is not None:
        found["moshi_paths, LoRA"] = weights(info.lora_weights)
    if settings.ttt_cache.adapter is not None:  # it brings the settings of the patch too
        for path in locate(settings.ttt_cache.adapter):
            found[f"ttt_cache.adapter, {path.name}"] = weights(path)
    for key, fingerprint in fingerprints.items():
        found[f"data.{key}"] = described(getattr(settings.data, key), fingerprint)
    return found


def weights(path: Path) -> Source:
    """A checkpoint: its size, its first 16 MB and as much again, spread evenly over the rest.

    That is all of a small file. In a large one another tensor of 4 MB is noticed and single other
    numbers may not be; but 15 GB need not be read twice.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(PIECES * PIECE))  # the header, which names tensors and shapes
        for start in range(file.tell(), size, max(PIECE, size // PIECES)):
            file.seek(start)
            digest.update(file.read(PIECE))
    return Source(str(path), digest.hexdigest())


def described(file: str, facts: Any) -> Source:
    """What is known by plain JSON values: a config, a data set by its token cache's fingerprint."""
    text = json.dumps(facts, sort_keys=True)
    return Source(file, hashlib.sha256(text.encode()).hexdigest())


def check_same(began_with: Mapping[str, str], sources: Mapping[str, Source], run_dir: Path) -> None:
    """Refuse what is not what the run began with.

    Args:
        began_with: identities by the keys of `sources`.

    Raises:
        ValueError: one is another, or one too few or too many; the message names key and file.
    """
    if gone := sorted(began_with.keys() - sources.keys()):
        raise ValueError(
            f"{gone[0]}: not given, but the run in {run_dir} began with one; put that back, or "
            "give another run_dir"
        )
    for key, source in sources.items():
        if began_with.get(key) != source.identity:
            raise ValueError(
                f"{key}: {source.file} is not what the run in {run_dir} began with; put that back, "
                "or give another run_dir"
            )
