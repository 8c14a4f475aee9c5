"""What a session of Moshi 7B costs: bytes, the time to save it and the time to go on with it.

The whole model at its own shapes in bf16, all 32 layers patched, and Mimi beside it. Their weights
are laid out on the CPU and never written, so that they take no memory; the states are real and hold
random numbers. One conversation is saved and restored, whole; the file goes through the checks and
to the disk as always.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import environment, publish, quiet_process
from moshi.models.compression import MimiModel
from moshi.models.lm import LMGen
from moshi.models.loaders import get_mimi, get_moshi_lm

import ttt_cache
from ttt_cache import fingerprint, session_file
from ttt_cache.evaluation.lines import Line
from ttt_cache.session_state import running

SETTINGS: dict[str, Any] = {"recent": 100, "virtual": 10}
Arms = dict[str, Callable[[], object]]


def models() -> tuple[LMGen, MimiModel, dict[str, Any], int]:
    """Moshi 7B, patched, and Mimi; the settings in full; bytes of the rings of stock Moshi."""
    lm = get_moshi_lm(None, device="meta", dtype=torch.bfloat16)
    settings = asdict(ttt_cache.patch(lm, **SETTINGS).config)
    stock = ttt_cache.report(lm).stock_bytes
    mimi = get_mimi(None, device="meta")
    return LMGen(lm.to_empty(device="cpu").eval()), mimi.to_empty(device="cpu"), settings, stock


def fill(gen: LMGen, mimi: MimiModel, seed: int) -> None:
    """Random numbers for every state, so that each byte is there to be written."""
    generator = torch.Generator().manual_seed(seed)
    for held in running(gen, mimi).rows.values():
        if held.tensor.is_floating_point():
            held.tensor.normal_(generator=generator)


def arms(gen: LMGen, mimi: MimiModel, folder: Path) -> Arms:
    """What is timed, by name."""
    alone, both = folder / "alone.safetensors", folder / "both.safetensors"
    ttt_cache.save_session(gen, alone)
    tensors, described = session_file.read_session(alone)
    return {
        "save": lambda: ttt_cache.save_session(gen, alone),
        "load": lambda: ttt_cache.load_session(gen, alone),
        "save, with Mimi": lambda: ttt_cache.save_session(gen, both, mimi=mimi),
        "load, with Mimi": lambda: ttt_cache.load_session(gen, both, mimi=mimi),
        "of each: fingerprint of the model": lambda: identity(gen),
        "of each: checksum of the file": lambda: session_file.checksum(tensors, described),
        "of save: writing the file": lambda: session_file.write_session(
            folder / "again.safetensors", tensors, described
        ),
        "of load: reading the file": lambda: session_file.read_session(alone),
    }


def identity(gen: LMGen) -> None:
    fingerprint.structure(gen.lm_model)
    fingerprint.weights(gen.lm_model)
    fingerprint.weights(gen.lm_model, adapter=True)


def timed(arms: Arms, repetitions: int) -> dict[str, list[float]]:
    """Milliseconds of every repetition; the arms take turns."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(-1, repetitions):  # the first warms up
        for name, run in arms.items():
            began = time.perf_counter_ns()
            run()
            if turn >= 0:
                times[name].append((time.perf_counter_ns() - began) / 1e6)
    return times


def main() -> None:
    quiet_process()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where sessions go, for the disk's sake")
    parser.add_argument("--out", type=Path, default=Path("out/session_cost.json"))
    options = parser.parse_args()
    record = environment(options.seed, "bfloat16")
    gen, mimi, settings, stock = models()
    with gen.streaming(1), mimi.streaming(1), tempfile.TemporaryDirectory(dir=options.folder) as at:
        fill(gen, mimi, options.seed)
        times = timed(arms(gen, mimi, Path(at)), options.repetitions)
        sizes = {name: Path(at, f"{name}.safetensors").stat().st_size for name in ("alone", "both")}
    lines = [
        Line("session file", sizes["alone"] / 1e6, "MB"),
        Line("session file, with Mimi", sizes["both"] / 1e6, "MB"),
        Line("rings of stock Moshi, which it would hold unpatched", stock / 1e6, "MB"),
        *(Line(name, statistics.median(each), "ms") for name, each in times.items()),
    ]
    settings["repetitions"] = options.repetitions
    publish("session_cost", options.out, record, settings, lines, times_ms=times)


if __name__ == "__main__":
    main()
