"""How much training it takes: recall and cross-entropy against steps, beside extended context."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..findings import Finding
from ..protocol import Point
from ..recipe import SWEEP
from .base import Plan
from .sweeps import Sweep, trained

SHARES = (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)  # of the recipe's steps


class Training(Sweep):
    name = "training"
    about = "Recall and cross-entropy against training steps, beside the extended context."
    question = "How much training beats a longer context?"
    axis = "training steps, each point a whole cycle of the learning rate"

    def along(self, plan: Plan) -> Iterable[Point]:
        settings = dict(plan.subject.settings)
        recipes = {recipe.steps: recipe for recipe in map(SWEEP.scaled, SHARES)}
        for steps, recipe in recipes.items():
            yield trained(f"{steps} steps", settings, steps, recipe)

    def scale(self, axes: Any, findings: dict[str, Finding]) -> None:
        axes.set_xscale("symlog", linthresh=max(1, SWEEP.steps // 16))
        axes.set_xlabel(self.axis)
