"""Training runs in processes of their own, which a test may kill."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest.mock import patch

import torch
import torch._dynamo  # imported late otherwise, by every process anew
import torch.utils.tensorboard
from data_support import tiny_mimi

from ttt_cache.training import checkpoint
from ttt_cache.training.config_file import read_settings
from ttt_cache.training.engine import train

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["training_process"])


def start(path: Path, slow: float = 0.0, **environment: str) -> ForkServerProcess:
    """Begin or resume a run; every file of a checkpoint takes `slow` seconds more to write."""
    process = _CONTEXT.Process(target=_train, args=(path, slow, environment), daemon=True)
    process.start()
    return process


def finish(*processes: ForkServerProcess) -> None:
    """Wait until all have ended well."""
    for process in processes:
        process.join(300)
        assert process.exitcode == 0, f"a process ended with {process.exitcode}"


def start_two(path: Path) -> list[ForkServerProcess]:
    """Begin or resume a run on two processes, as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(path, RANK=rank, LOCAL_RANK=rank, **common) for rank in ("0", "1")]


def _train(path: Path, slow: float, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    write = checkpoint._write

    def slowly(*args):
        time.sleep(slow)
        write(*args)
        time.sleep(slow)

    mimi = patch("moshi.models.loaders.CheckpointInfo.get_mimi", lambda *_, **__: tiny_mimi())
    with mimi, patch.object(checkpoint, "_write", slowly):
        train(read_settings(path))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
