"""The processes of a run: one, or many that share the rows of a batch."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from .settings import Settings


def accelerator_for(settings: Settings) -> Accelerator:
    """What lets a run's processes work together.

    Raises:
        ValueError: accelerate is set to FSDP.
    """
    mixed = "bf16" if settings.param_dtype == "bfloat16" else "no"
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # All wait while one tokenises, for hours.
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))
    # Said outright: else accelerate takes processes on CPUs for strangers to each other.
    cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=cpu, mixed_precision=mixed, kwargs_handlers=[unused, patient])
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError(
            "accelerate is set to FSDP, which is not supported: choose data parallelism (DDP), "
            "or train inside moshi-finetune (docs/finetune.md)"
        )
    return accelerator
