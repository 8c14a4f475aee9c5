"""Eight hours of conversation through a small patched Moshi transformer, one step at a time.

Shows that nothing grows with the length of a session: not the memory of the process, not the fast
weights, not the time of a step. The step time is measured at the end, on the state that has seen
everything and on one that has just begun, alternately, on the same model and inputs.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from common import environment, publish, quiet_process, transformer
from session import BLOCK, YOUNG, Conversation, States, age, lines_of, soak

import ttt_cache
from ttt_cache.evaluation.lines import Line
from ttt_cache.memory.tokens import LatentTokens

DIM, LAYERS, HEADS = 64, 2, 4
WARM_UP = 0.05  # share of the steps after which memory must not grow


def build(seed: int) -> Conversation:
    """The model, patched in all layers with default settings."""
    torch.manual_seed(seed)
    model = transformer(DIM, HEADS, LAYERS, 4 * DIM)
    handle = ttt_cache.patch(model)
    for cache in handle.caches.values():
        # A new memory adds nothing to the output; here it must be seen to stay finite.
        assert isinstance(cache.reader, LatentTokens)
        torch.nn.init.normal_(cache.reader.to_value, std=cache.reader.to_value.shape[1] ** -0.5)
    frames = torch.empty(BLOCK, 1, 1, DIM)
    return Conversation(model, handle, frames, lambda room, g: room.normal_(generator=g), model)


@torch.no_grad()
def run(steps: int, seed: int, pairs: int) -> tuple[list[Line], States, States]:
    """Lines of the table, details for the JSON, settings."""
    talk = build(seed)
    with talk.model.streaming(1):
        log = soak(talk, steps, seed + 1)
        old = talk.model.get_streaming_state()
    log |= age(talk, old, steps, pairs, seed + 2)
    settings = {"pairs": pairs, "young": YOUNG, **asdict(talk.handle.config)}
    warm = int(len(log["rss"]) * WARM_UP)
    return lines_of(log, steps, warm, talk.handle), log, settings


def main() -> None:
    quiet_process()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=360_000, help="8 hours at 12.5 a second")
    parser.add_argument("--pairs", type=int, default=4_000, help="timed steps of each state")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/soak.json"))
    options = parser.parse_args()
    record = environment(options.seed, "float32")
    lines, log, settings = run(options.steps, options.seed, options.pairs)
    publish("soak", options.out, record, settings, lines, log=log)


if __name__ == "__main__":
    main()
