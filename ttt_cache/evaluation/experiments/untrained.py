"""What a memory does that nobody trained, in a single layer."""

from __future__ import annotations

from collections.abc import Iterable

from ..arms import Arm
from ..protocol import Point
from .base import Plan
from .sweeps import Listed

MEMORIES = ("none", "mean", "cluster", "random", "ttt-linear", "ttt-mlp")


class Untrained(Listed):
    name = "untrained"
    about = "One layer patched and nothing trained: every memory, in the lowest and highest layer."
    question = "What does a memory do that nobody trained?"

    def along(self, plan: Plan) -> Iterable[Point]:
        count, given = plan.subject.layers, plan.subject.settings
        for layer in sorted({0, count // 2, count - 1}):
            for memory in MEMORIES:
                settings = {**given, "memory": memory, "layers": (layer,)}
                arm = Arm(memory, f"memory={memory} in layer {layer}", settings)
                yield Point(f"layer {layer}, {memory}", arm, ())
