"""The trained weights of a patch on disk: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from moshi.modules.transformer import StreamingTransformer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import CacheConfig
from .files import write_whole
from .patch import Patch, prepare, require_patch
from .targets import attention_of, find_transformer

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
FORMAT = 1


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], base_model: str | None = None
) -> Path:
    """Write the adapter of a patched model into `folder`, which is made if needed.

    Both files are written beside their places and then renamed: an error or a kill while writing
    leaves an adapter that is already there as it was.

    Args:
        base_model: name of the model that the adapter was trained on, for the record.

    Returns:
        the folder.

    Raises:
        RuntimeError: the model is not patched, or on the `meta` device.
        NotADirectoryError: `folder` is a file.
        TypeError: `base_model` is not a string.
    """
    handle = require_patch(model)
    if base_model is not None and not isinstance(base_model, str):
        raise TypeError(f"base_model must be a string or None, got {base_model!r}")
    if any(tensor.is_meta for tensor in _tensors(handle).values()):
        raise RuntimeError("model is on the meta device: its adapter has no weights to save")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder must be a directory, got the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    described = {
        "library": "ttt_cache",
        "format": FORMAT,
        "base_model_name_or_path": base_model,
        "base_model": _describe(handle.transformer),
        "config": handle.config.to_json(),
    }
    text = json.dumps(described, indent=2)
    tensors = {name: t.detach().cpu().contiguous() for name, t in _tensors(handle).items()}
    # The description travels in both files, so that a mixture of two adapters is noticed.
    write_whole(
        {
            folder / WEIGHTS_NAME: lambda path: save_file(tensors, path, {"adapter": text}),
            folder / CONFIG_NAME: lambda path: path.write_text(text + "\n", encoding="utf-8"),
        }
    )
    return folder


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> Patch:
    """Patch a model as an adapter's config says and load its weights.

    Args:
        folder: where `save_adapter` wrote, or the id of a repository on the Hugging Face hub.

    Returns:
        the patch, as `ttt_cache.patch` does.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: a file is damaged, or the adapter was made for another model; the message names
            the file or the field. The model is unchanged.
        RuntimeError: the model is patched already, streaming, or on the `meta` device.
    """
    config_path, weights_path = locate(folder)
    described = read_config(config_path)
    tensors = _read_weights(weights_path, described)
    transformer = find_transformer(model)
    _check_base(described["base_model"], transformer, config_path)
    try:
        config = CacheConfig.from_fields(described["config"])
        handle = prepare(model, config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config_path}: config: {error}") from error
    if any(tensor.is_meta for tensor in _tensors(handle).values()):
        raise RuntimeError("model is on the meta device: load its weights before an adapter")
    _check_tensors(tensors, _tensors(handle), weights_path)
    with torch.no_grad():
        for name, tensor in _tensors(handle).items():
            tensor.copy_(tensors[name])
    return handle.install()


def _tensors(handle: Patch) -> dict[str, Tensor]:
    """The adapter's tensors under the names they have on disk; shared ones under the first."""
    found: dict[int, tuple[str, Tensor]] = {}
    for layer, cache in handle.caches.items():
        for name, tensor in cache.state_dict(keep_vars=True).items():
            found.setdefault(id(tensor), (f"layers.{layer}.{name}", tensor))
    return dict(found.values())


def _describe(transformer: StreamingTransformer) -> dict[str, int]:
    """What must be the same in the model that an adapter is loaded into."""
    attention = attention_of(transformer, 0)
    return {
        "num_layers": len(transformer.layers),
        "dim": attention.embed_dim,
        "num_heads": attention.num_heads,
        "kv_heads": attention.num_heads // attention.kv_repeat,
    }


def _check_base(recorded: Any, transformer: StreamingTransformer, path: Path) -> None:
    for name, value in _describe(transformer).items():
        theirs = recorded.get(name) if isinstance(recorded, dict) else None
        if theirs != value:
            raise ValueError(
                f"{path}: base_model.{name}: the adapter is for {theirs}, this model has {value}"
            )


def _check_tensors(given: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    missing, unknown = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or unknown:
        problem = f"{missing[0]} is missing" if missing else f"{unknown[0]} is not expected"
        raise ValueError(f"{path}: {problem}")
    for name, tensor in wanted.items():
        if given[name].shape != tensor.shape or not given[name].is_floating_point():
            raise ValueError(
                f"{path}: {name} must be floating point of shape {list(tensor.shape)}, "
                f"got {given[name].dtype} of shape {list(given[name].shape)}"
            )


def read_config(path: Path) -> dict[str, Any]:
    """What `adapter_config.json` says.

    Raises:
        ValueError: it is damaged, or no adapter's; the message names the file.
    """
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # JSON and Unicode errors alike
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(described, dict) or described.get("library") != "ttt_cache":
        raise ValueError(f"{path}: library: not the config of a ttt_cache adapter")
    if described.get("format") != FORMAT:
        raise ValueError(f"{path}: format must be {FORMAT}, got {described.get('format')!r}")
    for field in ("base_model", "config"):
        if not isinstance(described.get(field), dict):
            raise ValueError(f"{path}: {field} must be an object, got {described.get(field)!r}")
    return described


def _read_weights(path: Path, described: dict[str, Any]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            written_with = (file.metadata() or {}).get("adapter", "")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    if _substance(written_with) != _substance(json.dumps(described)):
        raise ValueError(f"{path} and {CONFIG_NAME} beside it are not of the same adapter")
    return tensors


def _substance(text: str) -> Any:
    """What must agree in the two files of an adapter: all but the name of the base model."""
    try:
        described = json.loads(text)
    except ValueError:
        return None
    return {k: v for k, v in described.items() if k != "base_model_name_or_path"}


def locate(folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Config and weights of an adapter, downloaded if need be; `FileNotFoundError` without them."""
    if Path(folder).exists():
        paths = Path(folder) / CONFIG_NAME, Path(folder) / WEIGHTS_NAME
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"folder {folder} has no {path.name}")
        return paths
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        raise FileNotFoundError(f"folder {folder} does not exist, and is no hub id (owner/name)")
    try:
        config, weights = (
            Path(huggingface_hub.hf_hub_download(str(folder), name))
            for name in (CONFIG_NAME, WEIGHTS_NAME)
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"folder {folder} is neither a directory nor an adapter on the hub: {error}"
        ) from error
    return config, weights
