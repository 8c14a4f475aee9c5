"""Pure TTT layers in the upper half of a 32-layer Moshi, 48,000 frames one by one.

Layers 16-31 have no attention at all (`recent=0`): what they know of the conversation is in their
fast weights. The lower half keeps Moshi's own attention with its ring of 3000. Shows that the state
of such a layer has its final size with the first frame, in the same memory to the last, and that
neither weights, outputs, the process nor the time of a step grow.

The model is a real `LMModel` without its depformer, small in every width, fed with random codes. A
new TTT layer adds nothing to the output, so its way out is given random values.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import CONTEXT, environment, publish, quiet_process
from moshi.models.lm import LMModel
from session import BLOCK, YOUNG, Conversation, States, age, lines_of, soak
from torch import Tensor

import ttt_cache
from ttt_cache.evaluation.lines import Line
from ttt_cache.memory import QueryReader
from ttt_cache.report import state_bytes
from ttt_cache.targets import attention_of

NAMES = ("ttt-linear-layer", "ttt-mlp-layer")
LAYERS, TTT_LAYERS = 32, range(16, 32)
MODEL: dict[str, Any] = {
    "n_q": 4,
    "dep_q": 0,
    "card": 64,
    "text_card": 64,
    "delays": [0, 0, 1, 0, 1],
    "dim": 32,
    "num_heads": 2,
    "num_layers": LAYERS,
    "hidden_scale": 2,
    "context": CONTEXT,
    "gating": "silu",
    "norm": "rms_norm_f32",
    "positional_embedding": "rope",
}
SETTINGS: dict[str, Any] = {"memory_heads": 2, "memory_dim": 8, "hidden_dim": 16, "chunk": 8}


def build(preset: str, seed: int) -> Conversation:
    torch.manual_seed(seed)
    model = LMModel(**MODEL).eval()
    handle = ttt_cache.patch(model, layers=TTT_LAYERS, preset=preset, **SETTINGS)
    for cache in handle.caches.values():
        assert isinstance(cache.reader, QueryReader)
        torch.nn.init.normal_(cache.reader.to_output, std=cache.reader.to_output.shape[0] ** -0.5)
    codes = torch.empty(BLOCK, 1, model.num_codebooks, 1, dtype=torch.long)
    return Conversation(
        model,
        handle,
        codes,
        lambda room, generator: room.random_(MODEL["card"], generator=generator),
        lambda frame: torch.cat([part.flatten() for part in model.forward_text(frame)]),
        lambda: touch_rings(model),
    )


def touch_rings(model: LMModel) -> None:
    """Write into Moshi's own rings, whose zeros the system lays in one place until then.

    A ring that is laid out and one that is not are read at different speeds. What is written is
    masked: no frame has been there.
    """
    for layer in set(range(LAYERS)) - set(TTT_LAYERS):
        state = attention_of(model.transformer, layer)._streaming_state
        assert state is not None and state.kv_cache is not None
        state.kv_cache.cache.normal_()


def look(talk: Conversation) -> tuple[int, list[int]]:
    """Bytes of the patched layers' streaming states, and where their tensors lie."""
    tensors: list[Tensor] = [*talk.tensors(), *(state.exec_mask for state in talk.states())]
    return sum(map(state_bytes, talk.states())), [tensor.data_ptr() for tensor in tensors]


@torch.no_grad()
def run(preset: str, steps: int, seed: int, pairs: int) -> tuple[list[Line], States, States]:
    """Lines of the table, details for the JSON, settings."""
    talk = build(preset, seed)
    with talk.model.streaming(1):
        talk.prepare()
        first = next(talk.inputs(1, seed))
        talk.step(first[0])
        bytes_first, places_first = look(talk)
        log = soak(talk, steps - 1, seed + 1)
        bytes_last, places_last = look(talk)
        old = talk.model.get_streaming_state()
    log |= age(talk, old, steps, pairs, seed + 2)
    moved = sum(a != b for a, b in zip(places_first, places_last, strict=True))
    lines = [
        Line("state of layers 16-31 after the first frame", bytes_first, "bytes"),
        Line("state of layers 16-31 after the last frame", bytes_last, "bytes", bytes_first),
        Line("tensors of these states", len(places_first)),
        Line("of them, moved to other memory", moved, "", 0),
        *lines_of(log, steps, min(1 + CONTEXT // BLOCK, len(log["rss"]) - 1), talk.handle),
    ]
    settings = {"pairs": pairs, "young": YOUNG, "model": MODEL, **asdict(talk.handle.config)}
    return lines, log, settings


def main() -> None:
    quiet_process()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=NAMES, nargs="+", default=NAMES)
    parser.add_argument("--steps", type=int, default=48_000, help="64 minutes at 12.5 a second")
    parser.add_argument("--pairs", type=int, default=1_000, help="timed steps of each state")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/ttt_layers"), help="start of names")
    options = parser.parse_args()
    # Once, at the start: the library may change on disk while a preset runs.
    record = environment(options.seed, "float32")
    for preset in options.preset:
        lines, log, settings = run(preset, options.steps, options.seed, options.pairs)
        title, out = f"ttt_layers: {preset}", options.out.with_name(f"{options.out.name}-{preset}")
        publish(title, out.with_suffix(".json"), record, settings, lines, log=log)


if __name__ == "__main__":
    main()
