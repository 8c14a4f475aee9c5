"""What a device can do: whether it runs our kernels, and its rates at best, measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .timing import gpu_span

REPETITIONS = 15


def milliseconds(call: Callable[[], object], device: torch.device, calls: int = 5) -> float:
    """Median over several samples, each the mean over some calls in a row."""
    call()
    samples = []
    for _ in range(REPETITIONS):

        def several() -> None:
            for _ in range(calls):
                call()

        if device.type == "cuda":
            start, end = gpu_span(several, lambda: None)
            end.synchronize()
            samples.append(start.elapsed_time(end) / calls)
        else:
            began = time.perf_counter_ns()
            several()
            samples.append((time.perf_counter_ns() - began) / calls / 1e6)
    return statistics.median(samples)


def copy_bandwidth(device: torch.device, size: int = 2 << 30) -> float:
    """Bytes a second that a copy reads and writes together, at sizes that no cache holds."""
    source = torch.zeros(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / milliseconds(lambda: target.copy_(source), device) * 1e3


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """Operations a second (two for each multiply-add) of a product of two square matrices."""
    one, other = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / milliseconds(lambda: one @ other, device) * 1e3


def facts(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Of a GPU, JSON-able: what it is, and its measured rates."""
    about = torch.cuda.get_device_properties(device)
    return {
        "name": about.name,
        "capability": f"{about.major}.{about.minor}",
        "memory_bytes": about.total_memory,
        "l2_bytes": about.L2_cache_size,
        "multiprocessors": about.multi_processor_count,
        "cuda": torch.version.cuda,
        "copy_bytes_per_second": copy_bandwidth(device),
        "matmul_operations_per_second": matmul_rate(device, dtype),
    }


def triton_missing(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device; `None` where they can."""
    try:
        from ttt_cache.kernels.checks import check_device

        check_device(device)
    except (ImportError, ValueError) as error:
        return str(error)
    return None
