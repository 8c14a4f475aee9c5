"""A run's YAML: read, and refused with the key and what is allowed where it does not fit."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from .settings import Settings, Stage

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FROM_HUB = ("moshi_path", "mimi_path", "tokenizer_path", "lora_path")  # may be hf://REPO/FILE


def read_settings(path: str | os.PathLike[str]) -> Settings:
    """Read a run's YAML.

    Relative paths in it are relative to the working directory, as in moshi-finetune.

    Raises:
        FileNotFoundError: there is no such file, or a file that it names is missing.
        ValueError: it is not YAML, or a key is unknown, missing or of a value that is not allowed;
            the message names file and key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"CONFIG {path} does not exist")
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(given, Mapping):
        raise ValueError(f"{path} must hold keys and values, got {type(given).__name__}")
    try:
        settings = Settings.model_validate(dict(given))
    except ValidationError as error:
        raise ValueError(_explain(path, error)) from None
    _consistent(path, settings)
    _present(path, settings)
    return settings


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML's own would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value} is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _explain(path: Path, error: ValidationError) -> str:
    lines = []
    for found in error.errors():
        key = ".".join(str(part) for part in found["loc"])
        if found["type"] == "extra_forbidden":
            lines.append(f"{path}: {key}: unknown key{_known(found['loc'])}")
        elif found["type"] == "missing":
            lines.append(f"{path}: {key}: must be given")
        else:
            message = found["msg"].removeprefix("Value error, ")
            lines.append(f"{path}: {key}: {message}, got {found['input']!r}")
    return "\n".join(lines)


def _known(location: tuple[int | str, ...]) -> str:
    """The keys that are allowed beside an unknown one."""
    block: Any = Settings
    for part in location[:-1]:
        block = Stage if isinstance(part, int) else block.model_fields[part].annotation
    fields = getattr(block, "model_fields", None)
    return f"; the keys are {', '.join(fields)}" if fields else ""


def _consistent(path: Path, settings: Settings) -> None:
    """Refuse keys that contradict each other."""
    wide = [s.train for s in settings.ttt_cache.stages if s.train in ("layers", "everything")]
    if settings.full_finetuning and settings.lora.enable:
        raise ValueError(f"{path}: full_finetuning and lora.enable exclude each other: choose one")
    if wide and not (settings.full_finetuning or settings.lora.enable):
        raise ValueError(
            f"{path}: ttt_cache.stages: {wide[0]} changes Moshi's weights; set lora.enable or "
            "full_finetuning to true"
        )
    if settings.do_eval and not settings.data.eval_data:
        raise ValueError(f"{path}: data.eval_data must be given where do_eval is true")
    if settings.ttt_cache.adapter is not None and settings.ttt_cache.patch:
        raise ValueError(
            f"{path}: ttt_cache.adapter brings its own settings; leave out ttt_cache.patch"
        )
    for number, stage in enumerate(settings.ttt_cache.stages):
        lengths, steps = settings.lengths_of(stage), settings.steps_of(stage)
        if len(lengths) > steps:
            raise ValueError(
                f"{path}: ttt_cache.stages.{number}.frames: {len(lengths)} lengths need as many "
                f"steps at least, got {steps}"
            )


def _present(path: Path, settings: Settings) -> None:
    """Refuse files that are not there."""
    paths, adapter = settings.moshi_paths, settings.ttt_cache.adapter
    files: dict[str, str | None] = {
        "data.train_data": settings.data.train_data,
        "data.eval_data": settings.data.eval_data,
        "moshi_paths.config_path": paths.config_path,
    }
    for name in FROM_HUB:
        value = getattr(paths, name)
        files[f"moshi_paths.{name}"] = None if str(value).startswith("hf://") else value
    for key, value in files.items():
        if value and not Path(value).is_file():
            raise FileNotFoundError(f"{path}: {key}: {value} does not exist")
    if adapter is not None and not (Path(adapter).is_dir() or HUB_ID.fullmatch(adapter)):
        raise FileNotFoundError(
            f"{path}: ttt_cache.adapter: {adapter} does not exist, and is no hub id (owner/name)"
        )
