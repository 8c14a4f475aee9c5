"""A session on disk: one safetensors file, its description as JSON in the header, never pickle."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import write_whole

FORMAT = 1
KEY = "ttt_cache_session"  # of the description, in the header's metadata
OWNER_ONLY = 0o600  # what was said is nobody else's business
DESCRIBED = {"identity": dict, "conversations": int, "whole_batch": bool}  # what is needed of it
Described = dict[str, Any]


def write_session(path: Path, tensors: dict[str, Tensor], described: Described) -> None:
    """Write a session, whole or not at all, for its owner only.

    Args:
        tensors: contiguous and on the CPU.
        described: plain JSON values.

    Raises:
        FileNotFoundError: there is no folder for it.
        IsADirectoryError: `path` is a folder.
        OSError: the disk does not take it.
    """
    if path.is_dir():
        raise IsADirectoryError(f"file must be a file to write a session to, got the folder {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"file must be in a folder that exists, got {path}")
    described = {"library": "ttt_cache", "format": FORMAT, **described}
    described["checksum"] = checksum(tensors, described)
    header = {KEY: json.dumps(described, sort_keys=True)}
    try:
        write_whole({path: lambda temporary: save_file(tensors, temporary, header)}, OWNER_ONLY)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def read_session(path: Path) -> tuple[dict[str, Tensor], Described]:
    """Read a session and check that it is what was written.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no session, of another format, truncated or altered.
    """
    if not path.is_file():
        raise FileNotFoundError(f"file {path} is {'a folder' if path.is_dir() else 'not there'}")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    described = _description(path, header)
    if described.get("format") != FORMAT:
        raise ValueError(
            f"{path}: format must be {FORMAT}, got {described.get('format')!r}: the session was "
            f"saved by ttt_cache {described.get('version')}"
        )
    if described.pop("checksum", None) != checksum(tensors, described):
        raise ValueError(f"{path} is damaged: its contents are not those that were written")
    for name, kind in DESCRIBED.items():
        if not isinstance(described.get(name), kind):
            raise ValueError(f"{path} is damaged: it does not say its {name}")
    return tensors, described


def _description(path: Path, header: str | None) -> Described:
    try:
        described = json.loads(header or "null")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its description is no JSON: {error}") from error
    if not isinstance(described, dict) or described.get("library") != "ttt_cache":
        raise ValueError(f"{path} is not a session: save_session did not write it")
    return described


def checksum(tensors: dict[str, Tensor], described: Described) -> str:
    """SHA-256 of the description and of every name, dtype, shape and byte."""
    found = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
