"""A small Moshi, and a server of it as `ttt-cache serve` runs: for serve_soak."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ttt_cache.bench.serve.sound import FRAME
from ttt_cache.launch import from_settings
from ttt_cache.patch import Patch
from ttt_cache.serving.load import Files
from ttt_cache.serving.run import Options, Work, prepare

EXAMPLES = Path(__file__).parents[1] / "examples"


def make(folder: Path, seed: int) -> np.ndarray:
    """A checkpoint, and what is said: float32 `[voices, frames, FRAME]`."""
    torch.manual_seed(seed)
    small = runpy.run_path(str(EXAMPLES / "make_small.py"))
    clip = small["read_clip"]()
    small["make_moshi"](folder, small["make_tokenizer"](folder))
    small["make_mimi"](folder, clip)
    config = json.loads((folder / "config.json").read_text())
    config["lm_gen_config"] = {"use_sampling": False}
    (folder / "config.json").write_text(json.dumps(config))
    random, said = np.random.default_rng(seed), clip[0, 0].numpy()
    sounds = [np.roll(said, 7001 * number) * random.uniform(0.3, 1) for number in range(4)]
    noisy = np.stack(sounds) + random.normal(0, 0.01, (4, len(said)))
    return noisy.astype(np.float32).reshape(4, -1, FRAME)


def serve(folder: Path, port: int, rows: int, seed: int) -> None:
    """The server: `ttt-cache serve` in float32, which no flag of Moshi's asks for.

    In 16 bits a CPU rounds a row's products by its place in the batch.
    """
    torch.set_num_threads(1)

    def install(model: Any) -> Patch:
        torch.manual_seed(seed)
        handle = from_settings({})(model)
        for cache in handle.caches.values():  # a new memory adds nothing to the output
            for parameter in cache.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
        return handle

    names = ("model.safetensors", "mimi.safetensors", "tokenizer.model")
    files = Files(
        "none/needed",
        *(str(folder / name) for name in names),
        config_path=str(folder / "config.json"),
        device="cpu",
        dtype=torch.float32,
    )
    options = Options(rows, port=port, sessions=folder / "sessions")
    prepare(Work(options, files, install)).run()
