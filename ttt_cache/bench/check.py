"""Whether arms compute what they should: no speed of wrong answers is ever printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .arms import Arm
from .core import Core, Place

# Of the output's scale. In 32 bits that of docs/semantics.md; in 16 bits four roundings, of scores,
# weights, values and output.
ALLOWED = {
    torch.float32: 1e-5,
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
}


class WrongAnswerError(RuntimeError):
    """An arm does not compute what it should; the message says which, where and by how much."""


def check(
    arms: Mapping[str, tuple[Arm, Core]],
    place: Place,
    recent: int,
    chunk: int,
    steps: int,
    done: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Step new patched cores from their first frame past several memory versions.

    Before the first eviction each must equal stock; at any time, one that is not the reference path
    itself must equal that.

    Args:
        recent, chunk: of the arms, N and C.
        done: called after each step.

    Returns:
        the largest difference of each arm, as a share of the output's scale.

    Raises:
        WrongAnswerError: one is beyond what the dtype allows, or not finite.
    """
    patched = {name: pair for name, pair in arms.items() if not pair[0].stock}
    twins = {name: arm.twin(place) for name, (arm, _) in patched.items()}
    stock, apart = Core(place, recent + chunk), dict.fromkeys(patched, 0.0)
    for n in range(1, steps + 1):
        ((hidden,), (projected,)) = place.frames(1)
        # A ring of N + C holds all that a patched core sees before its first eviction.
        expected = stock.step(hidden, projected) if n <= recent else None
        for name, (arm, core) in patched.items():
            found, twin = core.step(hidden, projected), twins[name]
            exact = None if twin is None else twin.step(hidden, projected)
            if arm.partial or n >= recent:
                for other, what in ((expected, "stock Moshi"), (exact, "the reference path")):
                    if other is not None:
                        figure = off(found, other)
                        _require(figure, place.dtype, f"{name} is not {what} at frame {n}")
                        apart[name] = max(apart[name], figure)
        done()
    return apart


def off(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the scale of `other`."""
    return float((one - other).abs().max() / other.abs().max())


def _require(figure: float, dtype: torch.dtype, what: str) -> None:
    allowed = ALLOWED[dtype]
    if not figure <= allowed:  # nor if it is NaN
        raise WrongAnswerError(
            f"{what}: off by {figure:.3g} of the output's scale, allowed {allowed:.3g} in "
            f"{str(dtype).removeprefix('torch.')}. Nothing was timed."
        )
