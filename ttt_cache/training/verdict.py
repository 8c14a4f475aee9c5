"""Whether a trained memory is of use, in words, from controls beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .monitor import Observed

THIS_RUN, WINDOW, RESET = "this run", "window only", "memory reset"
FULL, BEFORE = "full context", "before training"

MARGIN = 0.005
LEAST_MASS = 0.01

Arms = Mapping[str, Mapping[str, float]]


def verdict(arms: Arms, observed: Mapping[int, Observed]) -> str:
    """Say whether the memory is used, not used, harmful, or gains nothing over its own reset.

    The control that decides is `memory reset`: the same weights, the memory put back to version 0
    before every read, so that nothing is read. What is lost with that is what the memory gave: what
    it remembered of a recording, and what it has learned from all of them, as a prompt would; a run
    with `preset: random` tells the two apart. `window only` is what the user would have without any
    of this.

    Two losses count as equal within `MARGIN`, half a percent. That is a choice, not a test of
    significance: all arms hear the same frames, so which recordings were drawn cancels; what
    remains is rounding (a logit in bfloat16 is off by up to 0.4%) and differences too small to pay
    for a memory (0.5% of a loss of 2 is 1% of perplexity). A new memory of the default size takes
    1 to 2% of a query (the gates' starting values on equal scores), so a mass below `LEAST_MASS`,
    1%, in every layer means that training has closed the gate. Where `memory reset` shows a gain
    all the same, the memory is used: a small share of a large branch can matter.

    Args:
        arms: mean losses (`loss`, `text_loss`, `audio_loss`) by arm, on the same frames; of these,
            `this run` must be there.
        observed: what each layer's memory did.

    Returns:
        a paragraph that begins with the verdict and has the numbers; what to try next where the
        memory is of no use.

    Raises:
        ValueError: `this run` is missing among the arms.
    """
    if THIS_RUN not in arms:
        raise ValueError(f"arms must have {THIS_RUN!r}, got {sorted(arms)}")
    loss = _loss(arms, THIS_RUN)
    if loss is None:
        return (
            "Failed: the loss of this run is not finite. Go back to a checkpoint before that; try "
            "a lower learning rate, a longer rise of it (optim.pct_start), or distil first."
        )
    gains = {name: g for name in (RESET, WINDOW) if (g := gain(arms, name)) is not None}
    sentences = _sentences(gains, _closed(observed))
    numbers = [_compared(arms, name) for name in (WINDOW, RESET) if name in gains]
    missing = [name for name in (WINDOW, RESET) if name not in gains]
    if missing:
        numbers.append(f"There is no finite loss of {' and '.join(missing)} to compare with.")
    told = [*numbers, *_parts(arms), _masses(observed), *_context(arms)]
    return " ".join([*sentences[:1], *told, *sentences[1:]])


def _sentences(gains: Mapping[str, float], closed: bool) -> tuple[str, str] | tuple[str]:
    """The verdict, and what to do next if there is anything."""
    by_reset, by_window = gains.get(RESET), gains.get(WINDOW)
    used = by_reset is not None and by_reset > MARGIN
    if used and by_window is not None and by_window < -MARGIN:
        return (
            "The memory is harmful: the trained weights rely on it, and a plain window still has "
            "the lower loss.",
            HARMFUL_NEXT,
        )
    if min(gains.values(), default=0.0) < -MARGIN:
        return "The memory is harmful: without it the loss is lower.", HARMFUL_NEXT
    if used:
        little = ", although little attention goes to it" if closed else ""
        return f"The memory is used{little}.", USED_NEXT
    if by_reset is not None and by_window is not None and by_window > MARGIN:
        return (
            "The memory is not used: there is no gain over a memory that is reset before every "
            "read. What was gained over the window comes from other trained weights, not from "
            "what the memory holds.",
            UNUSED_NEXT,
        )
    if closed:
        return "The memory is not used: hardly any attention goes to it.", UNUSED_NEXT
    if not gains:
        return (
            "It cannot be told whether the memory is used: there is no control.",
            "Evaluate with memory reset and window only.",
        )
    if by_window is not None and by_window > MARGIN:
        return (
            "The loss is lower than the window's, but whether the memory's contents are used "
            "cannot be told without memory reset.",
        )
    return "The memory is not used: the loss is the same without it.", UNUSED_NEXT


USED_NEXT = (
    "Whether by what it remembers of a recording or by what it has learned from all of them, a run "
    "with preset random, trained alike, tells."
)
UNUSED_NEXT = (
    "What to try next: longer sequences, so that more of what matters has left the window; a "
    "higher learning rate for the compressor; distilling it first (ttt-cache distill); a gate that "
    "starts more open."
)
HARMFUL_NEXT = (
    "What to try next: distil the memory first (ttt-cache distill); train longer or with a lower "
    "learning rate; if the memory adds more than the window does (ratio above 1), a gate that "
    "starts more closed; check that training and evaluation have sequences of like length."
)


def _closed(observed: Mapping[int, Observed]) -> bool:
    return bool(observed) and all(seen.mass < LEAST_MASS for seen in observed.values())


def _loss(arms: Arms, name: str, kind: str = "loss") -> float | None:
    loss = arms.get(name, {}).get(kind)
    return loss if loss is not None and math.isfinite(loss) else None


def gain(arms: Arms, name: str, kind: str = "loss") -> float | None:
    """How much lower this run's loss is than an arm's, as a share of the arm's; `None`: unknown."""
    loss, other = _loss(arms, THIS_RUN, kind), _loss(arms, name, kind)
    if loss is None or other is None:
        return None
    return (other - loss) / max(abs(other), 1e-12)


def _compared(arms: Arms, name: str) -> str:
    lower, loss, other = gain(arms, name), _loss(arms, THIS_RUN), _loss(arms, name)
    assert lower is not None
    if abs(lower) <= MARGIN:
        return f"The loss, {loss:.4g}, is within {MARGIN:.1%} of {name} ({other:.4g})."
    way = "below" if lower > 0 else "above"
    return f"The loss, {loss:.4g}, is {abs(lower):.1%} {way} {name} ({other:.4g})."


def _parts(arms: Arms) -> list[str]:
    """Text and audio apart: weights of the loss may hide one of them."""
    control = RESET if _loss(arms, RESET) is not None else WINDOW
    text, audio = (gain(arms, control, kind) for kind in ("text_loss", "audio_loss"))
    if text is None or audio is None:
        return []
    return [f"Beside {control}, text alone is {-text:+.1%}, audio alone {-audio:+.1%}."]


def _masses(observed: Mapping[int, Observed]) -> str:
    if not observed:
        return "No layer was observed."
    layer = max(observed, key=lambda each: observed[each].mass)
    most = observed[layer]
    if _closed(observed):
        return (
            f"Less than {LEAST_MASS:.0%} of attention goes to the memory in every layer, the most "
            f"in layer {layer} ({most.mass:.2%})."
        )
    least = min(seen.mass for seen in observed.values())
    return (
        f"Of attention, {least:.1%} to {most.mass:.1%} goes to the memory, the most in layer "
        f"{layer}."
    )


def _context(arms: Arms) -> list[str]:
    """What full context says of the task: how much there was to gain."""
    window, full = _loss(arms, WINDOW), _loss(arms, FULL)
    loss = _loss(arms, THIS_RUN)
    if window is None or full is None or loss is None:
        return []
    if window - full <= MARGIN * abs(window):
        return [
            f"Full context ({full:.4g}) gains less than {MARGIN:.1%} over the window here, so "
            "there is next to nothing for a memory to gain: judge it on longer recordings."
        ]
    share = (window - loss) / (window - full)
    return [f"Of what full context ({full:.4g}) gains over the window, it has {share:.0%}."]
