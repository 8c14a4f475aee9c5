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
    """Raise `ValueError` where a saved state does not fit the generator that is here."""
    for name, state in generators_of(device).items():
        if name in saved and saved[name].shape != state.shape:
            got = list(saved[name].shape)
            raise ValueError(
                f"{path}: the state of the {name} generator must be of shape {list(state.shape)}, "
                f"got {got}: it comes from another version of torch"
            )


def set_generators(saved: dict[str, Tensor], device: torch.device) -> None:
    """What a device has no generator for is left out: nothing there draws from it."""
    if "cpu" in saved:
        torch.set_rng_state(saved["cpu"])
    if "cuda" in saved and device.type == "cuda":
        torch.cuda.set_rng_state(saved["cuda"], device)
