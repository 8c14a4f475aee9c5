"""Checkpoints that a run goes on from exactly.

A checkpoint is a folder `checkpoints/step_000100`: it is written under another name and renamed
when it is whole, so whatever has its name is complete, and a kill loses at most the steps since.

    position.json        where the run was: step, stage, position in the data
    weights.safetensors  what is trained, float32
    optimizer.pt         tensors and numbers only, read with `weights_only`
    carry-0.safetensors  the states that process 0 goes on with, one file each
    adapter/             the memory, as `ttt_cache.load_adapter` reads it
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from ttt_cache.adapter import save_adapter

FORMAT = 1
_REMEDY = "remove this checkpoint to go on from the one before it"
POSITION, WEIGHTS, OPTIMIZER = "position.json", "weights.safetensors", "optimizer.pt"
FIELDS = ("step", "stage", "stage_step", "stream", "schedule", "before", "observed", "processes")
_NAME = re.compile(r"step_(\d+)")


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [p for p in (run_dir / "checkpoints").glob("step_*") if _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda path: int(path.name.split("_")[1]))


def save(
    accelerator: Accelerator,
    run_dir: Path,
    model: nn.Module,
    lm: nn.Module,
    optimizer: Optimizer,
    position: Mapping[str, Any],
    carried: Mapping[str, Tensor],
    keep: int | None,
) -> Path:
    """Write a checkpoint; every process calls it.

    Args:
        model: as `accelerator.prepare` gave it.
        lm: the patched language model in it.
        position: plain JSON values with `step`.
        carried: this process's states by name.
        keep: newest checkpoints that are kept; `None` keeps all.

    Raises:
        OSError: it cannot be written, such as on a full disk; the message names the file, older
            checkpoints are untouched, and what was half written is removed.
    """
    folder = run_dir / "checkpoints" / f"step_{position['step']:06d}"
    partial = folder.with_name(f".{folder.name}.partial")
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights = get_model_state_dict(model, options=whole)
    moments = get_optimizer_state_dict(model, optimizer, options=whole)
    try:
        if accelerator.is_main_process:
            for left in folder.parent.glob(".step_*.partial"):  # by a kill
                shutil.rmtree(left)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        carry = partial / f"carry-{accelerator.process_index}.safetensors"
        _write(carry, lambda: save_file(_plain(carried), carry))
        if accelerator.is_main_process:
            tensors = {name: t.float() for name, t in _plain(weights).items()}
            _write(partial / WEIGHTS, lambda: save_file(tensors, partial / WEIGHTS))
            _write(partial / OPTIMIZER, lambda: torch.save(moments, partial / OPTIMIZER))
            _write(partial / "adapter", lambda: save_adapter(lm, partial / "adapter"))
            made = {"format": FORMAT, "processes": accelerator.num_processes}
            text = json.dumps(made | dict(position), indent=2) + "\n"
            _write(partial / POSITION, lambda: (partial / POSITION).write_text(text))
        accelerator.wait_for_everyone()
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if accelerator.is_main_process:
        partial.rename(folder)
        for old in checkpoints(run_dir)[: -keep or None] if keep else []:
            # Renamed first: what has a checkpoint's name is whole, also when this is killed.
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.partial")))
    accelerator.wait_for_everyone()
    return folder


def read_position(folder: Path) -> dict[str, Any]:
    """Where the run was at a checkpoint.

    Raises:
        ValueError: the file is damaged or of another format; the message names it.
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
    return position


def restore(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Put a checkpoint's weights, and the optimizer's state, back.

    Raises:
        ValueError: a file is damaged or of another model; the message names it.
    """
    weights: dict[str, Any] = dict(read_tensors(folder / WEIGHTS))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        name = name.removeprefix("module.")
        if name not in weights or weights[name].shape != parameter.shape:
            got = list(weights[name].shape) if name in weights else "nothing"
            raise ValueError(
                f"{folder / WEIGHTS}: {name} must be of shape {list(parameter.shape)}, got {got}: "
                "it is a checkpoint of another model or another patch"
            )
    broadcast = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, weights, options=broadcast)
    try:
        moments = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no common type for damaged files
        raise ValueError(
            f"{folder / OPTIMIZER} is missing or damaged: {error}; {_REMEDY}"
        ) from error
    set_optimizer_state_dict(model, optimizer, moments, options=broadcast)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; raises `ValueError` naming it if it is damaged or missing."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is missing or damaged: {error}; {_REMEDY}") from error


def read_states(folder: Path, processes: int) -> dict[str, Tensor]:
    """The states of all rows, whichever process had them; empty where none are carried.

    Raises:
        ValueError: a file is missing, damaged or unlike the others; the message names it.
    """
    paths = [folder / f"carry-{number}.safetensors" for number in range(processes)]
    parts = [read_tensors(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if part.keys() != parts[0].keys():
            raise ValueError(f"{path} does not go with {paths[0].name} beside it; {_REMEDY}")
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _plain(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}


def _write(path: Path, write: Any) -> None:
    try:
        write()
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap them
        raise OSError(f"{path} cannot be written: {error}") from error
