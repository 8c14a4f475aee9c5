"""Train the testbed's Moshi from scratch, then its memories, and write all in the real formats.

    python benchmarks/make_testbed.py            # writes out/testbed, in an hour and a half

What the package ships in `ttt_cache/data/testbed` is the folder that this writes. The same command
goes on after an interruption: a base that is done, and adapters that are, are not trained again.

Sequences grow to the model's context, 1,024 frames, six levels of the stream mixed
(`ttt_cache/testbed/stream.py`). The loss is Moshi's: text, and audio through the depformer. Then
the model is frozen, and the adapters learn by the recipes in `ttt_cache/evaluation/recipe.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from moshi.models.lm import LMModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ttt_cache.adapter import CONFIG_NAME, WEIGHTS_NAME
from ttt_cache.checks import seed_of, threads_here
from ttt_cache.evaluation.adapters import HISTORY, adapter_for
from ttt_cache.evaluation.arms import controls
from ttt_cache.evaluation.model import LESSONS
from ttt_cache.evaluation.recipe import DEFAULT
from ttt_cache.evaluation.source import TestbedSource
from ttt_cache.evaluation.subject import TESTBED_SETTINGS
from ttt_cache.files import make_folder
from ttt_cache.testbed import files
from ttt_cache.testbed.model import CONFIG, CONTEXT
from ttt_cache.testbed.stream import LEARNED, LEVELS, NONE, Batch, draw
from ttt_cache.testbed.vocabulary import PADDING
from ttt_cache.training.schedule import optimizer_for

STAGES = ((64, 64, 400), (128, 32, 300), (256, 16, 300), (512, 8, 600), (1024, 4, 600))
LR, WEIGHT_DECAY, PCT_START, MAX_NORM = 1.5e-3, 0.01, 0.1, 1.0
PADDING_WEIGHT, AUDIO_WEIGHT = 0.05, 0.25
LOGGED = 25  # steps
ADAPTERS = "hierarchical", "hybrid", "random"


def loss_of(model: LMModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss, and the share of right answers."""
    out = model(batch.codes)
    text, logits = batch.codes[:, 0], out.text_logits[:, 0]
    each = F.cross_entropy(logits.flatten(0, 1), text.flatten(), reduction="none")
    weight = torch.where(text == PADDING, PADDING_WEIGHT, 1.0).flatten()
    told = batch.codes[:, 1 : 1 + model.dep_q]
    audio = F.cross_entropy(out.logits[out.mask], told[out.mask])
    asked = batch.answer != NONE
    right = (logits.argmax(-1) == batch.answer)[asked].float().mean()
    return (each * weight).sum() / weight.sum() + AUDIO_WEIGHT * audio, right


def base(out: Path, seed: int) -> LMModel:
    """The frozen base in `out`, trained now unless it is there already."""
    if has_base(out, seed):
        print(f"the base is in {out} already, of the same seed and stages: it is not trained again")
    else:
        torch.manual_seed(seed)
        model = LMModel(**CONFIG)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            seconds = train(model, seed, bar)
        files.write(model, out, {"seed": seed, "seconds": round(seconds), "stages": STAGES})
    # Read from its files in either case: adapters are kept under what the base is.
    return files.checkpoint(out).get_moshi("cpu", dtype=torch.float32).requires_grad_(False)


def has_base(folder: Path, seed: int) -> bool:
    """Whether a model of these sizes, trained by these stages with this seed, is there."""
    path = folder / files.CONFIG_NAME
    if not path.is_file():
        return False
    there = json.loads(path.read_text(encoding="utf-8"))
    wanted = json.loads(json.dumps({**CONFIG, "seed": seed, "stages": STAGES}))
    return {**there, **there.get("model_id", {})}.items() >= wanted.items()


def train(model: LMModel, seed: int, bar: Progress) -> float:
    """Returns the seconds that it took."""
    steps = sum(count for *_, count in STAGES)
    optimizer, schedule = optimizer_for(
        list(model.parameters()), LR, WEIGHT_DECAY, steps, PCT_START
    )
    rng, begin, done, seen = random.Random(f"base {seed}"), time.perf_counter(), 0, []
    levels = [LEVELS[name] for name in LEARNED]
    task = bar.add_task("", total=steps)
    for frames, rows, count in STAGES:
        for _ in range(count):
            loss, right = loss_of(model, draw(rows, frames, levels, rng))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            schedule.step()
            done += 1
            seen.append((loss.item(), right.item()))
            bar.update(task, description=f"{frames} frames", completed=done)
            if done % LOGGED == 0:
                loss, right = torch.tensor(seen).mean(0).tolist()
                spent = time.perf_counter() - begin
                bar.console.print(
                    f"{frames} frames, step {done} of {steps}, {spent:.0f} s: "
                    f"loss {loss:.4f}, right answers {right:.4f}"
                )
                seen.clear()
    return time.perf_counter() - begin


def train_adapters(model: LMModel, out: Path, kept: Path, seed: int) -> None:
    """Into `out/NAME`; the model must be frozen and in eval mode.

    Args:
        kept: where they stay as they were trained; an interrupted run goes on from there.
    """
    arms = controls(CONTEXT, CONFIG["num_layers"], TESTBED_SETTINGS, CONTEXT)
    for name in ADAPTERS:
        arm, source = arms[name], TestbedSource(*LESSONS)
        recipe = arm.recipe or DEFAULT
        made = adapter_for(model, source, arm.lesson, recipe, kept, seed)
        (out / name).mkdir(parents=True, exist_ok=True)
        for file in (CONFIG_NAME, WEIGHTS_NAME, HISTORY):
            shutil.copy(made / file, out / name / file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/testbed"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    given = parser.parse_args()
    out = given.out.resolve()  # "." too has a name, beside which adapters are kept
    kept = out.with_name(f"{out.name}-adapters")
    try:
        seed_of("--seed", given.seed)
        torch.set_num_threads(threads_here("--threads", given.threads))
        for folder in (out, kept):
            make_folder("--out", folder)
    except ValueError as error:
        parser.error(str(error))
    train_adapters(base(out, given.seed), out / "adapters", kept, given.seed)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
