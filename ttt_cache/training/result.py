"""What a training run came to, and what its figures say by themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ttt_cache.config import CacheConfig

from .monitor import Observed

THIS_RUN, WINDOW, RESET = "this run", "window only", "memory reset"
FULL, BEFORE = "full context", "before training"

MARGIN = 0.005  # losses that differ by less, as a share, count as equal: see verdict.py
LEAST_MASS = 0.01

Arms = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        arms: mean losses (`loss`, `text_loss`, `audio_loss`) by arm, in the order of the page, on
            the same frames; none at all without held-out recordings, else `this run` among them.
        observed: what each layer's memory did.
        patch: settings of the patch.
        stages: what was trained, in order.
        from_adapter: whether the memory had been trained before.

    Raises:
        ValueError: there are arms, but not `this run`.
    """

    arms: Arms
    observed: Mapping[int, Observed]
    patch: CacheConfig
    stages: tuple[str, ...]
    from_adapter: bool = False

    def __post_init__(self) -> None:
        if self.arms and THIS_RUN not in self.arms:
            raise ValueError(f"arms must have {THIS_RUN!r}, got {sorted(self.arms)}")

    @property
    def tuned(self) -> bool:
        """Whether Moshi was trained along with its memory."""
        return not {"layers", "everything"}.isdisjoint(self.stages)

    @property
    def closed(self) -> bool:
        """Whether next to no attention goes to the memory, in any layer."""
        seen = self.observed.values()
        return bool(seen) and all(each.mass < LEAST_MASS for each in seen)


def loss_of(arms: Arms, name: str, kind: str = "loss") -> float | None:
    """The loss of an arm; `None` if it is not there or not finite."""
    loss = arms.get(name, {}).get(kind)
    return loss if loss is not None and math.isfinite(loss) else None


def gain(arms: Arms, name: str, kind: str = "loss") -> float | None:
    """How much lower this run's loss is than an arm's, as a share of the arm's; `None`: unknown."""
    loss, other = loss_of(arms, THIS_RUN, kind), loss_of(arms, name, kind)
    if loss is None or other is None:
        return None
    return (other - loss) / max(abs(other), 1e-12)


def alone(arms: Arms) -> list[str]:
    """The loss where no control says more."""
    loss = loss_of(arms, THIS_RUN)
    if loss is None:
        return ["There is no eval_data to judge it on."]
    known = {name: loss_of(arms, name) for name in (BEFORE, FULL)}
    others = [f"; {name}: {other:.4g}" for name, other in known.items() if other is not None]
    return [f"The loss is {loss:.4g}{''.join(others)}."]


def compared(arms: Arms, name: str) -> str:
    """This run's loss beside a control's."""
    lower, loss, other = gain(arms, name), loss_of(arms, THIS_RUN), loss_of(arms, name)
    if lower is None:
        return f"There is no finite loss of {name} to compare with."
    if abs(lower) <= MARGIN:
        return f"The loss, {loss:.4g}, is within {MARGIN:.1%} of {name} ({other:.4g})."
    way = "below" if lower > 0 else "above"
    return f"The loss, {loss:.4g}, is {abs(lower):.1%} {way} {name} ({other:.4g})."


def parts(arms: Arms) -> list[str]:
    """Text and audio apart: weights of the loss may hide one of them."""
    text, audio = (gain(arms, RESET, kind) for kind in ("text_loss", "audio_loss"))
    if text is None or audio is None:
        return []
    return [f"Beside {RESET}, text alone is {-text:+.1%}, audio alone {-audio:+.1%}."]


def masses(result: Result) -> str:
    """How much attention goes to the memory."""
    observed = result.observed
    if not observed:
        return "No layer was observed."
    layer = max(observed, key=lambda each: observed[each].mass)
    most = observed[layer].mass
    if result.closed:
        return (
            f"Less than {LEAST_MASS:.0%} of attention goes to the memory in every layer, the most "
            f"in layer {layer} ({most:.2%})."
        )
    least = min(seen.mass for seen in observed.values())
    return f"Of attention, {least:.1%} to {most:.1%} goes to the memory, the most in layer {layer}."


def context(arms: Arms) -> list[str]:
    """What full context says of the task: how much there was to gain."""
    loss, window, full = (loss_of(arms, name) for name in (THIS_RUN, WINDOW, FULL))
    if window is None or full is None or loss is None:
        return []
    if window - full <= MARGIN * abs(window):
        said = f"Full context ({full:.4g}) gains less than {MARGIN:.1%} over the window here"
        if window - loss > MARGIN * abs(window):
            return [f"{said}, unlike this run."]
        nothing = "so there is next to nothing for a memory to gain: judge it on longer recordings."
        return [f"{said}, {nothing}"]
    share = (window - loss) / (window - full)
    return [f"Of what full context ({full:.4g}) gains over the window, it has {share:.0%}."]
