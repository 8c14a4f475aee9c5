"""A Ray cluster for tests, on loopback, gone afterwards with all that it began."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch_support import program

# Ray would look for an address other than 127.0.0.1, and would listen to the network at that.
# It also gives its workers the niceness 15: on a busy machine they hardly run, and all is too late.
SETTINGS = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
}
LONGEST = 120.0


@contextmanager
def cluster(cpus: int) -> Iterator[Any]:
    """Ray in this process; yields the module, and sets `RAY_ADDRESS` for others."""
    before = dict(os.environ)
    os.environ.update(SETTINGS)
    import ray

    try:
        ray.init("local", num_cpus=cpus, include_dashboard=False, object_store_memory=100 * 2**20,
                 log_to_driver=False, logging_level=logging.ERROR,
                 _node_ip_address="127.0.0.1")  # fmt: skip
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        yield ray
    finally:
        began = descendants(os.getpid(), "ray")
        ray.shutdown()
        finish(began)
        os.environ.clear()
        os.environ.update(before)


def descendants(process: int, word: str = "") -> dict[int, str]:
    """What processes a process has begun that are there, and when each was; with a word of each."""
    parents, found, began = {}, {process}, {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            parents[int(entry.name)] = int(fields[1]), fields[19]
    while more := {each for each, (parent, _) in parents.items() if parent in found} - found:
        found |= more
    for each in found - {process}:
        with contextlib.suppress(OSError):
            if word in Path(f"/proc/{each}/cmdline").read_text():
                began[each] = parents[each][1]
    return began


def finish(began: dict[int, str], seconds: float = 20) -> list[int]:
    """Wait until processes are gone; kill those that are not, and return them."""
    deadline = time.monotonic() + seconds
    while (left := [each for each in began if _is(each, began[each])]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.1)
    for each in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
    return left


def _is(process: int, began: str) -> bool:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[19] == began and fields[0] != "Z"


@contextmanager
def command(words: list[str], cwd: Path, ready: str) -> Iterator[subprocess.Popen]:
    """`ttt-cache` until it has said that it serves; it is gone afterwards, and its children."""
    process = program("-m", "ttt_cache.cli", *words, cwd=cwd, stderr=subprocess.STDOUT)
    try:
        said: list[str] = []
        for line in process.stdout or ():
            said.append(line)
            if ready in line:
                break
        else:
            raise AssertionError("".join(said))
        yield process
    finally:
        began = descendants(process.pid)
        process.kill()
        process.wait()
        finish(began, 5)
