"""The Serve application: what is the same for every replica, and what a replica needs."""

from __future__ import annotations

from dataclasses import replace

import torch
from ray import serve
from ray.serve import Application

from ..run import Work
from .replica import Replica

NAME = "ttt-cache"
HEALTH_S = 2.0  # between two looks; a replica that fails three is replaced
SHUTDOWN_S = 60.0  # for a replica to save and close all, when Serve ends it


def gpus(work: Work) -> int:
    """That a replica needs."""
    return int(torch.device(work.files.device).type == "cuda")


def application(work: Work, replicas: int) -> Application:
    """What `serve.run` takes."""
    work = replace(work, options=work.options.absolute(), files=work.files.absolute())
    deployment = serve.deployment(Replica).options(  # type: ignore[attr-defined]
        name="replicas",
        num_replicas=replicas,
        ray_actor_options={"num_gpus": gpus(work), "num_cpus": 1},
        max_constructor_retry_count=1,  # what is wrong with a model is wrong each time
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=SHUTDOWN_S,
    )
    return deployment.bind(work)
