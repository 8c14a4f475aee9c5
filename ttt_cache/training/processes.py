"""The processes of a run: one, or many that share the rows of a batch."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import InitProcessGroupKwargs

from .settings import Settings

SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")


def accelerator_for(settings: Settings) -> Accelerator:
    """What lets a run's processes work together.

    Raises:
        ValueError: accelerate is set to shard the model.
    """
    _refuse_sharding()
    mixed = "bf16" if settings.param_dtype == "bfloat16" else "no"
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # All wait while one tokenises, for hours.
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))
    # Said outright: else accelerate takes processes on CPUs for strangers to each other.
    cpu = not torch.accelerator.is_available()
    return Accelerator(cpu=cpu, mixed_precision=mixed, kwargs_handlers=[unused, patient])


def _refuse_sharding() -> None:
    """As `accelerate launch` asks for it; on CPUs accelerate itself would pass over it silently."""
    for kind in SHARDED:
        if os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true":
            raise ValueError(
                f"accelerate is set to {kind}, which is not supported: choose data parallelism "
                "(DDP), or train inside moshi-finetune (docs/finetune.md)"
            )
