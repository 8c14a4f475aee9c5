"""The experiments of the plan, by the names of their commands."""

from .base import Experiment, Plan
from .controls import Controls
from .generalisation import Generalisation
from .pairs import Pairs
from .sweeps import Gates, Layers, Recent, Virtual
from .training import Training
from .unbounded import Unbounded
from .untrained import Untrained

ALL: tuple[Experiment, ...] = (
    Controls(),
    Recent(),
    Virtual(),
    Gates(),
    Layers(),
    Training(),
    Unbounded(),
    Untrained(),
    Generalisation(),
    Pairs(),
)
EXPERIMENTS = {experiment.name: experiment for experiment in ALL}

__all__ = ["ALL", "EXPERIMENTS", "Experiment", "Plan"]
