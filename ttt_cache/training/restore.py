"""Going on from a checkpoint: every file of it is checked, and named if it does not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from .checkpoint import FORMAT, OPTIMIZER, POSITION, WEIGHTS

_REMEDY = "remove this checkpoint to go on from the one before it"
FIELDS = ("step", "stage", "stage_step", "stream", "schedule", "before", "observed", "unreported")
FIELDS += ("made_from", "carried", "processes")


def read_position(folder: Path, steps: Sequence[int]) -> dict[str, Any]:
    """Where the run was at a checkpoint.

    Args:
        steps: of each stage of the run.

    Raises:
        ValueError: the file is damaged, of another format or of another run; the message names it.
    """
    path = folder / POSITION
    try:
        position = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}; {_REMEDY}") from None
    if not isinstance(position, dict) or position.get("format") != FORMAT:
        raise ValueError(f"{path}: format must be {FORMAT}; {_REMEDY}")
    if missing := [name for name in FIELDS if name not in position]:
        raise ValueError(f"{path}: {missing[0]} is missing; {_REMEDY}")
    place = [position[name] for name in FIELDS[:3]]
    if not _in_run(place[0], place[1], place[2], steps) or folder.name != f"step_{place[0]:06d}":
        named = ", ".join(f"{name} {value!r}" for name, value in zip(FIELDS, place, strict=False))
        raise ValueError(f"{path}: {named} is no place in this run; {_REMEDY}")
    return position


def _in_run(step: Any, stage: Any, done: Any, steps: Sequence[int]) -> bool:
    """Whether a run has that step, as the step `done` of its stage."""
    if not type(step) is type(stage) is type(done) is int:
        return False
    within = 0 <= stage < len(steps) and 0 <= done <= steps[stage]
    return within and step == sum(steps[:stage]) + done


def restore(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Put a checkpoint's weights, and the optimizer's state, back.

    Raises:
        ValueError: a file is damaged or of another model; the message names it.
    """
    trained = {
        name.removeprefix("module."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    weights = _weights(folder / WEIGHTS, trained)
    moments = _moments(folder / OPTIMIZER, trained)
    broadcast = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, weights, options=broadcast)
    set_optimizer_state_dict(model, optimizer, moments, options=broadcast)


def _weights(path: Path, trained: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    weights: dict[str, Any] = dict(read_tensors(path))
    for name, parameter in trained.items():
        if name not in weights or weights[name].shape != parameter.shape:
            got = list(weights[name].shape) if name in weights else "nothing"
            raise ValueError(
                f"{path}: {name} must be of shape {list(parameter.shape)}, got {got}: "
                "it is a checkpoint of another model or another patch"
            )
    return weights


def _moments(path: Path, trained: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """The optimizer's state; torch itself passes over what is missing in it."""
    try:
        moments = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no common type for damaged files
        raise ValueError(f"{path} is missing or damaged: {error}; {_REMEDY}") from error
    try:
        found = {name: of["exp_avg"].shape for name, of in moments["state"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not of AdamW: {error!r}; {_REMEDY}") from error
    if found != {name: parameter.shape for name, parameter in trained.items()}:
        raise ValueError(f"{path} is not of what this stage trains; {_REMEDY}")
    return moments


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; raises `ValueError` naming it if it is damaged or missing."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}; {_REMEDY}") from error


def read_states(folder: Path, position: Mapping[str, Any]) -> dict[str, Tensor]:
    """The states of all rows, whichever process had them; empty where none are carried.

    Args:
        position: what `read_position` gave.

    Raises:
        ValueError: a file is missing, damaged or of other states; the message names it.
    """
    paths = [folder / f"carry-{number}.safetensors" for number in range(position["processes"])]
    parts = [read_tensors(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if sorted(part) != position["carried"]:
            raise ValueError(f"{path} does not go with {POSITION} beside it; {_REMEDY}")
    return {name: torch.cat([part[name] for part in parts]) for name in position["carried"]}
