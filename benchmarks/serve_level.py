"""One level of serve_gpu: a server in this process, and its clients in another."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ttt_cache.bench.serve.plan import Plan, make_plan
from ttt_cache.bench.serve.server import conversations
from ttt_cache.serving.run import Server

Level = dict[str, Any]


def measure(server: Server, options: argparse.Namespace) -> Level:
    """Serve, and put as many clients on a server as it has rows; what that showed."""
    with tempfile.TemporaryDirectory() as out, ThreadPoolExecutor(1) as beside:
        plan = make_plan(
            f"ws://127.0.0.1:{server.options.port}", None, [server.options.rows],
            options.seconds, options.warm_up, options.codec, options.seed, Path(out),
        )  # fmt: skip
        over = threading.Event()
        level = beside.submit(put_on, plan, over)
        try:
            server.run()  # until it is told to end
        finally:
            over.set()
        return level.result()


def put_on(plan: Plan, over: threading.Event) -> Level:
    """Run `ttt-cache bench serve` in a process of its own; then end the server of this one.

    Args:
        over: that server has ended by itself: nobody is there to take a signal.
    """
    try:
        while conversations(plan) is None and not over.wait(0.1):
            pass  # it does not listen yet
        words = shlex.split(plan.command)[1:]
        subprocess.run([sys.executable, "-m", "ttt_cache.cli", *words], check=True)
        return json.loads((plan.out / "serve.json").read_text())["levels"][0]
    finally:
        if not over.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
