"""The loss on held-out sessions, each from its first frame to its last, in constant memory."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from moshi.models.lm import LMModel

from ttt_cache.patch import Patch

from .carry import Caches, Carry, memory_reset, window_only
from .data import LMFacts, SegmentStream, Sessions
from .loss import Weights, predict, targets
from .result import FULL, RESET, THIS_RUN, WINDOW
from .step import over_processes, sums_of, totals_of

Losses = dict[str, float]


def evaluate(
    accelerator: Accelerator,
    lm: LMModel,
    handle: Patch,
    sessions: Sessions,
    frames: int,
    weights: Weights,
    caches: Caches | None = None,
) -> Losses:
    """`loss`, `text_loss` and `audio_loss` over all sessions; every process calls it.

    Args:
        frames: length of the segments; it changes speed and memory, not the result.
        caches: what answers in the patched layers, see `Carry`; the patch's own by default.
    """
    facts, world, rank = LMFacts.of(lm), accelerator.num_processes, accelerator.process_index
    stream = SegmentStream(sessions, facts, world, range(rank, rank + 1))
    carry = Carry(handle, caches)
    lengths = [[-(-n // frames) for n in sessions.frames[row::world]] for row in range(world)]
    sums = totals = torch.zeros(3, device=accelerator.device)
    with torch.no_grad(), accelerator.autocast():
        for segment in range(max(map(sum, lengths))):  # as many on every process
            batch = stream.next_batch(frames)
            codes = batch.codes.to(accelerator.device)
            with carry.segment(batch.fresh.to(accelerator.device)):
                logits = predict(lm, codes)
            if segment < sum(lengths[rank]):
                target = targets(facts, codes, weights)
                sums = sums + sums_of(logits, target, None)
                totals = totals + totals_of(target)
    totals = over_processes(accelerator, totals).clamp_min(1e-8)
    means = over_processes(accelerator, sums) / totals
    text, audio = float(means[0]), float(means[1])
    return {"loss": text + audio, "text_loss": text, "audio_loss": audio}


def arms_of(handle: Patch) -> dict[str, Caches]:
    """The trained memory and its controls: window alone, memory reset, and full context.

    Without the first two where a layer has no window or no memory.
    """
    arms = {
        THIS_RUN: handle.caches,
        WINDOW: window_only(handle),
        RESET: memory_reset(handle),
        FULL: {},
    }
    return {name: caches for name, caches in arms.items() if caches is not None}
