"""What a server says of itself, where it is ours: `/health` and `/metrics`."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from .plan import Plan

PATIENCE_S = 2.0


@dataclass(frozen=True)
class Seen:
    """Its counters at one moment.

    Args:
        buckets: steps that took at most so many seconds.
    """

    frames: float
    late: float
    rows: float
    state_bytes: float
    buckets: Mapping[float, float]


def conversations(plan: Plan) -> int | None:
    """How many a server has; `None` if it does not tell."""
    try:
        return int(json.loads(_get(plan, "/health"))["conversations"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def look(plan: Plan) -> Seen | None:
    """Its metrics; `None` if it has none."""
    try:
        return seen_in(_get(plan, "/metrics"))
    except (OSError, ValueError, KeyError):
        return None


def seen_in(text: str) -> Seen:
    """Read Prometheus's text format; raises `ValueError` or `KeyError` if that is not ours."""
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    prefix = "ttt_cache_"
    plain = {s.name.removeprefix(prefix): s.value for s in samples if not s.labels}
    steps = [s for s in samples if s.name == f"{prefix}step_seconds_bucket"]
    return Seen(
        plain["frames_total"],
        plain["late_frames_total"],
        plain["rows"],
        plain["state_bytes"],
        {float(s.labels["le"]): s.value for s in steps},
    )


def step_quantile(before: Seen, after: Seen, quantile: float) -> float | None:
    """Seconds of a step between two looks, as Prometheus reckons them: within a bucket, evenly.

    Returns:
        `None` without a step; infinite beyond the last bucket.
    """
    edges = sorted(after.buckets)
    counts = [after.buckets[edge] - before.buckets.get(edge, 0.0) for edge in edges]
    if not counts or not counts[-1]:
        return None
    wanted, below, low = quantile * counts[-1], 0.0, 0.0
    for edge, count in zip(edges, counts, strict=True):
        if count >= wanted and count > below:
            share = (wanted - below) / (count - below)
            return math.inf if math.isinf(edge) else low + share * (edge - low)
        below, low = count, edge
    return math.inf


def _get(plan: Plan, path: str) -> str:
    """Raises `OSError` without an answer of status 200; `ValueError` if it is no text."""
    request = urllib.request.Request(plan.page(path), headers=plan.headers)
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        return answer.read().decode()
