"""What Ray Serve adds to `serve_overhead.py`: processor time of its proxy and of the replica.

    python benchmarks/serve_overhead_ray.py --clients 8 --frames 10000 --ahead 1

The same model that answers with what it was given, the same clients, but through Serve's proxy, to
one replica, on a cluster of this machine alone. Beside it: `serve_overhead.py --ahead 1`. With one
frame ahead each message travels by itself, as those of people who talk do; with 20 Serve passes on
several at once.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ray
from ray import serve
from serve_overhead import Bytes, Echo, clients
from starlette.applications import Starlette

from ttt_cache.serving.cluster.asgi import Asgi
from ttt_cache.serving.cluster.replica import entrance
from ttt_cache.serving.service import Model, Service
from ttt_cache.serving.talk import Limits

PROXY, REPLICA = "ray::ProxyActor", "ray::ServeReplica"


class Stub:
    """A replica whose model costs nothing."""

    def __init__(self, rows: int) -> None:
        from ttt_cache.serving.codec import CODECS  # of its process: else a copy comes along

        CODECS["opus"] = Bytes
        model = Model(ThreadPoolExecutor(1), Echo(rows), lambda token: "a")  # type: ignore[arg-type]
        service = Service(model, None, 30)
        self.application: Starlette = Asgi(service.host, Limits()).application()
        self._serving = asyncio.ensure_future(service.run(asyncio.Event().wait()))


def processor_time(title: str) -> float:
    """Seconds that the processes of this cluster with a title have computed."""
    ticks, parents, found = os.sysconf("SC_CLK_TCK"), {}, []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            words = (stat.parent / "cmdline").read_text()
        except OSError:
            continue
        process = int(stat.parent.name)
        parents[process] = int(fields[1])
        if words.startswith(title):
            found.append((process, (int(fields[11]) + int(fields[12])) / ticks))
    return sum(used for process, used in found if parents.get(parents[process]) == os.getpid())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--ahead", type=int, default=1)
    given = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init("local", include_dashboard=False, object_store_memory=100 * 2**20,
             log_to_driver=False, logging_level=logging.ERROR,
             _node_ip_address="127.0.0.1")  # fmt: skip
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    deployment = serve.deployment(serve.ingress(entrance)(Stub))
    serve.run(deployment.options(max_ongoing_requests=1000).bind(given.clients))
    asyncio.run(clients(port, given.clients, given.clients * 50, given.ahead))  # warm
    frames = given.frames // given.clients * given.clients
    before, began = [processor_time(each) for each in (PROXY, REPLICA)], time.perf_counter()
    asyncio.run(clients(port, given.clients, frames, given.ahead))
    seconds = time.perf_counter() - began
    for title, start in zip((PROXY, REPLICA), before, strict=True):
        used = processor_time(title) - start
        print(f"{title}: {used / frames * 1e3:.3f} ms of processor time per frame")
    print(f"{frames} frames in {seconds:.0f} s")
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
