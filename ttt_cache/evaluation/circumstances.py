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

from .protocol import machine


def circumstances(device: torch.device) -> dict[str, Any]:
    """JSON-able: the `command` that was given, `versions`, `device` and CPU `threads`."""
    where = machine(device)
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {
            "ttt_cache": __version__,
            "torch": torch.__version__,
            "moshi": version("moshi"),
            "python": platform.python_version(),
        },
        "device": f"{device} ({where['kind']})",
        "threads": where["threads"],
    }
