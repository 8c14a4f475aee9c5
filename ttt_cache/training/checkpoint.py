"""Checkpoints that a run goes on from exactly.

A checkpoint is a folder `checkpoints/step_000100`: it is written under another name and renamed
when it is whole and on the disk, so whatever has its name is complete, and a kill or a power cut
loses at most the steps since.

    position.json        where the run was, and what it was made from
    weights.safetensors  what is trained, float32
    optimizer.pt         tensors and numbers only, read with `weights_only`
    carry-0.safetensors  the states that process 0 goes on with, one file each
    adapter/             the memory, as `ttt_cache.load_adapter` reads it
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.optim import Optimizer

from ttt_cache.adapter import save_adapter

FORMAT = 1
POSITION, WEIGHTS, OPTIMIZER = "position.json", "weights.safetensors", "optimizer.pt"
FOLDER, ADAPTER = "checkpoints", "adapter"
_NAME = re.compile(r"step_(\d+)")


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [p for p in (run_dir / FOLDER).glob("step_*") if _NAME.fullmatch(p.name)]
    return sorted(found, key=lambda path: int(path.name.split("_")[1]))


def folder_of(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return run_dir / FOLDER / f"step_{step:06d}"


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
    folder = folder_of(run_dir, position["step"])
    if folder.exists():  # an interruption came when it was whole
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        _write_files(accelerator, partial, model, lm, optimizer, position, carried)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if accelerator.is_main_process:
        partial.rename(folder)
        _sync(folder.parent, run_dir)
        _remove_all_but(run_dir, keep)
    accelerator.wait_for_everyone()
    return folder


def _write_files(
    accelerator: Accelerator,
    partial: Path,
    model: nn.Module,
    lm: nn.Module,
    optimizer: Optimizer,
    position: Mapping[str, Any],
    carried: Mapping[str, Tensor],
) -> None:
    """Every process its own states, the main one everything else; then all is on the disk."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    weights = get_model_state_dict(model, options=whole)
    moments = get_optimizer_state_dict(model, optimizer, options=whole)
    if accelerator.is_main_process:
        for left in partial.parent.glob(".step_*.partial"):  # by a kill
            shutil.rmtree(left)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    carry = partial / f"carry-{accelerator.process_index}.safetensors"
    _write(carry, lambda: save_file(_plain(carried), carry))
    if accelerator.is_main_process:
        tensors = {name: t.float() for name, t in _plain(weights).items()}
        _write(partial / WEIGHTS, lambda: save_file(tensors, partial / WEIGHTS))
        _write(partial / OPTIMIZER, lambda: torch.save(moments, partial / OPTIMIZER))
        _write(partial / ADAPTER, lambda: save_adapter(lm, partial / ADAPTER))
        made = {"format": FORMAT, "processes": accelerator.num_processes}
        text = json.dumps(made | {"carried": sorted(carried)} | dict(position), indent=2) + "\n"
        _write(partial / POSITION, lambda: (partial / POSITION).write_text(text))
    accelerator.wait_for_everyone()


def _remove_all_but(run_dir: Path, keep: int | None) -> None:
    """Remove checkpoints but the newest; `None` keeps all."""
    for old in checkpoints(run_dir)[: -keep or None] if keep else []:
        # Renamed first: what has a checkpoint's name is whole, also when this is killed.
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.partial")))


def _plain(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}


def _write(path: Path, write: Any) -> None:
    try:
        write()
        _sync(*path.rglob("*"), path, path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap them
        raise OSError(f"{path} cannot be written: {error}") from error


def _sync(*paths: Path) -> None:
    """Wait until files, or the names in folders, are on the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
