"""A replica's metrics through Ray's agents, which tag each with its replica.

`/metrics` would be answered by one replica by chance. Names and labels stay those of `metrics.py`
(Ray puts `ray_` before them); histograms go as their buckets, which is what is asked for p99.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray.serve import metrics as ray_metrics

from ..metrics import Metrics

EVERY_S = 5.0


class Export:
    """Passes on what has changed since it did so before."""

    def __init__(self, metrics: Metrics) -> None:
        self._registry = metrics.registry
        self._made: dict[str, Any] = {}
        self._before: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}

    async def run(self) -> None:
        """For ever."""
        while True:
            self.pass_on()
            await asyncio.sleep(EVERY_S)

    def pass_on(self) -> None:
        for metric in self._registry.collect():
            for sample in metric.samples:
                if not sample.name.endswith("_created"):
                    self._sample(metric.type == "gauge", metric.documentation, sample)

    def _sample(self, gauge: bool, documentation: str, sample: Any) -> None:
        if sample.name not in self._made:
            kind = ray_metrics.Gauge if gauge else ray_metrics.Counter
            tags = tuple(sample.labels)
            self._made[sample.name] = kind(sample.name, description=documentation, tag_keys=tags)
        made = self._made[sample.name]
        if gauge:
            made.set(sample.value, tags=sample.labels)
            return
        place = sample.name, tuple(sorted(sample.labels.items()))
        if (more := sample.value - self._before.get(place, 0.0)) > 0:
            made.inc(more, tags=sample.labels)
            self._before[place] = sample.value
