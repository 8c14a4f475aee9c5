"""Metrics of a replica through Ray: what has changed, each time."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from ttt_cache.serving.metrics import Metrics

pytest.importorskip("ray")

from ttt_cache.serving.cluster import export as module


class Kind:
    """Ray's counter and gauge, as far as they are used."""

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.tag_keys, self.values = tag_keys, defaultdict(float)
        made[name] = self

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0 and set(tags) == set(self.tag_keys)
        self.values[tuple(sorted(tags.items()))] += value

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[tuple(sorted(tags.items()))] = value


made: dict[str, Kind] = {}


def test_every_sample_is_passed_on_once(monkeypatch: Any) -> None:
    monkeypatch.setattr(module.ray_metrics, "Counter", Kind)
    monkeypatch.setattr(module.ray_metrics, "Gauge", Kind)
    metrics = Metrics(4, 1000)
    export = module.Export(metrics)
    for number in range(3):
        metrics.stepped(number, 1, 0.02 * number)
        metrics.refused("full")
        metrics.ended(1000 + number)
        metrics.conversations.set(number)
        export.pass_on()
    export.pass_on()  # nothing has changed
    for metric in metrics.registry.collect():
        for sample in metric.samples:
            if not sample.name.endswith("_created"):
                place = tuple(sorted(sample.labels.items()))
                assert made[sample.name].values[place] == sample.value, sample
    assert made["ttt_cache_step_seconds_bucket"].tag_keys == ("le",)
    assert made["ttt_cache_ended_total"].values[("code", "1001"),] == 1
