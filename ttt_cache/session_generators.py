"""The random generators that a whole batch draws from, in a session."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def generators_of(device: torch.device) -> dict[str, Tensor]:
    """States of the random generators that a step draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def check_generators(path: Path, saved: dict[str, Tensor], device: torch.device) -> None:
    """Raise `ValueError` unless saved states are states of generators here."""
    for name in generators_of(device):
        if name not in saved:
            continue
        try:  # on one that nothing draws from
            torch.Generator(device if name == "cuda" else "cpu").set_state(saved[name])
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"{path}: the state of the {name} generator is none here, as if from another "
                f"version of torch: {error}"
            ) from error


def set_generators(saved: dict[str, Tensor], device: torch.device) -> None:
    """What a device has no generator for is left out: nothing there draws from it."""
    if "cpu" in saved:
        torch.set_rng_state(saved["cpu"])
    if "cuda" in saved and device.type == "cuda":
        torch.cuda.set_rng_state(saved["cuda"], device)
