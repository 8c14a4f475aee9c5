"""Whether a trained memory is of use, in words, from controls beside it.

The control that decides is `memory reset`: the same weights and frames, the memory put back to
version 0 before every read, so that nothing is read. What is lost with that is what the memory
gave: what it remembered of a recording, and what it has learned from all of them, as a prompt
would; a run with `preset: random` tells the two apart. `window only` is what the user would have
without any of this: as many frames as a layer ever sees exactly, so never fewer than this run.

Two losses count as equal within `MARGIN`, half a percent. That is a choice, not a test of
significance: all arms hear the same frames, so which recordings were drawn cancels; what remains is
rounding (a logit in bfloat16 is off by up to 0.4%) and differences too small to pay for a memory
(0.5% of a loss of 2 is 1% of perplexity). A new memory of the default size takes 1 to 2% of a query
(the gates' starting values on equal scores), so a mass below `LEAST_MASS`, 1%, in every layer means
that training has closed the gate. Where `memory reset` shows a gain all the same, the memory is
used: a small share of a large branch can matter.
"""

from __future__ import annotations

from collections.abc import Mapping

from ttt_cache.exclusions import NETWORKS

from .result import (
    MARGIN,
    RESET,
    THIS_RUN,
    WINDOW,
    Result,
    alone,
    compared,
    context,
    gain,
    loss_of,
    masses,
    parts,
)

FAILED = (
    "Failed: the loss of this run is not finite. Go back to a checkpoint before that; try a lower "
    "learning rate, or a longer rise of it (optim.pct_start)."
)
NO_MEMORY = "There is no memory to judge: the patch is a window."
NO_WINDOW = (
    "It cannot be told whether the memory is used: a layer without a window (recent: 0) has "
    "nothing else to answer with, so no control leaves the memory out. Judge the run by its loss."
)
NO_DATA = (
    "It cannot be told whether the memory helps: there is no eval_data. Give data.eval_data to see "
    "the run beside its controls."
)
TUNED = (
    "Moshi was trained along and has grown used to its memory: arms without one look worse than "
    "stock Moshi would."
)
SHUT = "The memory is not used: hardly any attention goes to it."
SAME = "The memory is not used: the loss is the same without it."
HARMFUL = "The memory is harmful: without it the loss is lower."
BEATEN = "The memory is used, but a plain window of as many frames has the lower loss."
UNKNOWN = "It cannot be told whether the memory is used."
WHY_USED = (
    "Whether by what it remembers of a recording or by what it has learned from all of them, a run "
    "with preset random, trained alike, tells."
)


def verdict(result: Result) -> str:
    """Say whether the memory is used, not used or harmful, or why that cannot be told.

    Returns:
        a paragraph that begins with the verdict and has the numbers; what to try next where the
        memory is of no use.
    """
    arms, recent = result.arms, result.patch.recent
    if arms and loss_of(arms, THIS_RUN) is None:
        said = [FAILED]
    elif result.patch.memory == "none":
        said = [NO_MEMORY, *alone(arms)]
    elif 0 in (recent.values() if isinstance(recent, Mapping) else [recent]):
        said = [NO_WINDOW, *alone(arms)]
    elif arms:
        first, then = _judged(result)
        numbers = [compared(arms, WINDOW), compared(arms, RESET), *parts(arms)]
        along = [TUNED] if result.tuned else []
        said = [first, *numbers, masses(result), *context(arms), *along, *then]
    elif result.closed:
        said = [SHUT, masses(result), NO_DATA, _unused_next(result)]
    else:
        said = [NO_DATA, masses(result)]
    return " ".join(said)


def _judged(result: Result) -> tuple[str, list[str]]:
    """The verdict, and what to do next if there is anything."""
    by_reset, by_window = (gain(result.arms, name) for name in (RESET, WINDOW))
    if by_reset is None:
        return UNKNOWN, []
    if by_reset < -MARGIN:
        return HARMFUL, [_harmful_next(result)]
    if by_reset <= MARGIN:
        return SHUT if result.closed else SAME, [_unused_next(result)]
    if by_window is not None and by_window < -MARGIN:
        return BEATEN, [
            _advice("a smaller chunk, so that fewer frames wait to be evicted", "longer training")
        ]
    little = ", although little attention goes to it" if result.closed else ""
    learned = result.patch.memory in NETWORKS and result.patch.read == "virtual"
    return f"The memory is used{little}.", [WHY_USED] if learned else []


def _unused_next(result: Result) -> str:
    return _advice(
        "longer sequences, so that more of what matters has left the window",
        "a higher learning rate for the memory",
        *_other_stage(result),
        "a gate that lets it in (gate: fixed gives it 1 - alpha of every query)",
    )


def _harmful_next(result: Result) -> str:
    return _advice(
        *_other_stage(result),
        "longer training, or a lower learning rate",
        "training and evaluation on sequences of like length",
        "if the memory adds more than the window does (ratio above 1), a gate that holds it back "
        "(gate: fixed with alpha near 1)",
    )


def _advice(*steps: str) -> str:
    return f"What to try next: {'; '.join(steps)}."


def _other_stage(result: Result) -> list[str]:
    """The way of training the memory that this run has left out."""
    if set(result.stages) == {"distill"}:
        return ["training it on Moshi's loss after distillation (stage compressor)"]
    if "distill" in result.stages or result.from_adapter:
        return []
    return ["distilling it first (stage distill)"]
