"""The four models of the demo: the same weights, and what each keeps of a conversation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from moshi.models.lm import LMModel

import ttt_cache
from ttt_cache import testbed
from ttt_cache.config import CacheConfig

ADAPTER = "hierarchical"


@dataclass(frozen=True)
class Arm:
    """One model; `about` says in a few words what it keeps."""

    name: str
    about: str
    lm: LMModel


@dataclass(frozen=True)
class Arms:
    """What is compared.

    Attributes:
        window: frames that the arm of that name keeps, the most that `config` ever keeps exactly.
        context: frames of the testbed's own ring.
        config: of the hierarchical cache.
    """

    each: list[Arm]
    window: int
    context: int
    config: CacheConfig


def make_arms(frames: int, device: str) -> Arms:
    """The testbed's Moshi four times, for conversations of `frames` frames."""
    memory, stock = testbed.load(device), testbed.load(device)
    config = ttt_cache.load_adapter(memory, testbed.adapter(ADAPTER)).config
    assert isinstance(config.recent, int) and stock.context is not None
    window = config.recent + config.chunk - 1
    each = [
        Arm("window", f"the last {window} frames", _with_ring(window, device)),
        Arm("stock ring", f"the last {stock.context} frames", stock),
        Arm("full cache", "every frame", _with_ring(frames, device)),
        Arm("hierarchical", f"{config.recent} to {window} frames and a memory", memory),
    ]
    return Arms(each, window, stock.context, config)


def _with_ring(frames: int, device: str) -> LMModel:
    """The stock model with a ring of another size."""
    context = {"context": frames}
    return testbed.checkpoint().get_moshi(device, dtype=torch.float32, lm_kwargs_overrides=context)
