"""Under which circumstances a result was made, as its file tells them."""

from __future__ import annotations

import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ttt_cache.version import __version__


def machine(device: torch.device) -> dict[str, Any]:
    """What the time of a step depends on beside the model."""
    is_cuda = device.type == "cuda"
    kind = torch.cuda.get_device_name(device) if is_cuda else platform.machine()
    return {"device": device.type, "kind": kind, "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    """Of what a figure may depend on."""
    return {
        "ttt_cache": __version__,
        "torch": torch.__version__,
        "moshi": version("moshi"),
        "python": platform.python_version(),
    }


def circumstances(device: torch.device) -> dict[str, Any]:
    """JSON-able: the `command` that was given, `versions`, `device` and CPU `threads`."""
    where = machine(device)
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": versions(),
        "device": f"{device} ({where['kind']})",
        "threads": where["threads"],
    }
