"""`ttt-cache serve --ray`: from a cluster, or none yet, to the signal that ends the application."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray import serve
from ray._private.utils import read_ray_address  # that of `ray start`
from ray.exceptions import RayError

from ...launch import say
from ..listen import bound, tls
from ..run import Work
from ..signals import signalled
from .app import NAME, application, gpus
from .others import registry
from .replica import refusal

REACH_S = 5.0
LOCAL = "local"  # Ray's word in RAY_ADDRESS for a cluster of one's own
OBJECTS = 200 * 2**20  # bytes that a cluster of our own keeps for large messages; there are none


@dataclass
class Server:
    """An application that serves; made by `prepare`."""

    work: Work
    replicas: int
    undo: contextlib.ExitStack

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM; then save every conversation."""
        options = self.work.options
        with self.undo:
            say(f"{self.replicas} x {options.rows} conversations at {options.url}")
            asyncio.run(signalled(tidy=True))  # Ray would leave processes
            say("stopping; every conversation is saved and closed")


def prepare(work: Work, replicas: int | None) -> Server:
    """Deploy the application and wait until every replica has its model.

    Args:
        replicas: `None`: as many as there are GPUs that are free; one on CPUs.

    Raises:
        OSError, ValueError, RuntimeError: as without Ray, or the cluster cannot be used; nothing
            is left running.
    """
    options = work.options
    options.check()
    if options.ssl is not None:
        tls(options.ssl)
    if torch.device(work.files.device).index is not None:
        raise ValueError(f"--device must name no number with --ray, got {work.files.device}")
    options.store()
    with contextlib.ExitStack() as undo:
        undo.enter_context(_alone(options.port))
        for each in bound(options.host, options.port):  # not shared: nobody else listens there
            each.close()
        undo.callback(ray.shutdown)
        _connect()
        count = _count(work, replicas)
        undo.callback(_end)
        _deploy(work, count)
        return Server(work, count, undo.pop_all())


def _alone(port: int) -> socket.socket:
    """Hold a port against another command's replicas, which could share it with ours.

    Raises:
        ValueError: another command of this machine has it.
    """
    held = socket.socket(socket.AF_UNIX)
    try:
        held.bind(f"\0ttt-cache serve --ray: {port}")  # gone with this process, however it ends
    except OSError:
        held.close()
        raise ValueError(
            f"port {port} is in use by another ttt-cache serve --ray; choose another --port"
        ) from None
    return held


def _end() -> None:
    """End the replicas, each after its conversations, then Serve and the registry."""
    with contextlib.suppress(RayError, TimeoutError):
        serve.delete(NAME)
        serve.shutdown()
        ray.kill(registry(NAME))


def _connect() -> None:
    """Join the cluster that is there, or begin one that this machine alone can reach.

    Raises:
        ValueError: there is none at RAY_ADDRESS.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported unless asked for
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray would warn otherwise
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    address = os.environ.get("RAY_ADDRESS") or None
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    # By name: "auto" also tries whatever looks like Ray among the processes of the machine.
    found = read_ray_address() if address in (None, "auto") else address
    try:
        if found not in (None, LOCAL):
            _reach(found)
            ray.init(found, **quiet)
            return
        if address == "auto":
            raise ValueError("none was begun on this machine")
    except (OSError, RuntimeError, ValueError) as error:
        if address is not None:
            raise ValueError(f"no Ray cluster answers at RAY_ADDRESS={address}: {error}") from None
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 is for work that can wait
    ray.init(
        LOCAL,
        include_dashboard=False,
        object_store_memory=OBJECTS,
        _node_ip_address="127.0.0.1",  # else Ray, which asks nobody who they are, is open to all
        **quiet,
    )


def _reach(address: str) -> None:
    """Raise `OSError` or `ValueError` unless something listens: Ray would try for a minute."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError("HOST:PORT is wanted")
    socket.create_connection((host, int(port)), REACH_S).close()


def _count(work: Work, replicas: int | None) -> int:
    """How many replicas there are to be.

    Raises:
        ValueError: the cluster has no room for them, or Serve runs there already.
    """
    status = serve.status()
    if status.applications or status.proxies:
        raise ValueError(
            "Ray Serve runs on this cluster already: end it with 'serve shutdown', or add the "
            "application to it with 'serve deploy' (docs/cluster.md)"
        )
    kind = "GPU" if gpus(work) else "CPU"
    free = int(ray.available_resources().get(kind, 0))
    if not free:
        raise ValueError(f"no {kind} of the Ray cluster is free")
    count = (free if kind == "GPU" else 1) if replicas is None else replicas
    if not 1 <= count <= free:
        raise ValueError(f"--replicas must be 1 to {free}, the {kind}s that are free, got {count}")
    return count


def _deploy(work: Work, replicas: int) -> None:
    serve.start(proxy_location="Disabled")  # clients connect to the replicas themselves
    try:
        serve.run(application(work, replicas), name=NAME, route_prefix=None)
    except RuntimeError as error:
        said = serve.status().applications[NAME].deployments.values()
        why = "\n".join(each.message for each in said)  # of a replica, with its traceback
        raise ValueError(refusal(why) or f"{error}\n{why}") from None
