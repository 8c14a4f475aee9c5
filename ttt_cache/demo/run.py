"""The demo from its plan to its files."""

from __future__ import annotations

import json
import platform
import shlex
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from moshi.models.lm import LMModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ttt_cache.files import write_whole
from ttt_cache.version import __version__

from .clip import FRAME, encode
from .conversation import Record, converse, threads
from .figures import as_json
from .picture import draw
from .plan import Plan
from .table import table


def run(plan: Plan, stock: LMModel, patched: LMModel) -> dict[str, Any]:
    """Hold the conversation, print the table, write `demo.png` and `demo.json`.

    Returns:
        What is in the JSON file.
    """
    progress = Console(stderr=True)
    start = time.perf_counter()
    with threads(plan.threads):
        with progress.status("Encoding the clip with Mimi"):
            codes = encode(plan.clip, plan.seed, plan.device)
        with _bar(progress) as bar:
            task = bar.add_task("Talking", total=plan.frames, speed=0.0)
            begin = time.perf_counter()

            def on_frame(done: int) -> None:
                if done % 10 == 0 or done == plan.frames:
                    speed = done / (time.perf_counter() - begin)
                    bar.update(task, completed=done, speed=speed)

            record = converse(
                stock, patched, codes, plan.frames, plan.seed, plan.depformer, on_frame
            )
    result = _circumstances(plan, stock) | as_json(record)
    result["wall_seconds"] = round(time.perf_counter() - start, 1)
    _write(plan, stock, record, result)
    _say(plan, stock, result)
    return result


def _bar(console: Console) -> Progress:
    # Few refreshes: they take time from the steps that are being measured.
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("frames, {task.fields[speed]:.0f} frames/s,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        refresh_per_second=2,
    )


def _circumstances(plan: Plan, model: LMModel) -> dict[str, Any]:
    kind = torch.cuda.get_device_name(plan.device) if plan.device != "cpu" else platform.machine()
    return {
        "note": "all weights are random: cost, not quality of speech",
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": {
            "ttt_cache": __version__,
            "torch": torch.__version__,
            "moshi": version("moshi"),
            "python": platform.python_version(),
        },
        "device": f"{plan.device} ({kind})",
        "threads": plan.threads,
        "seed": plan.seed,
        "clip": plan.name,
        "clip_frames": plan.clip.shape[-1] // FRAME,
        "settings": asdict(plan.config),
        "model": {
            "dim": model.dim,
            "layers": len(model.transformer.layers),
            "context": model.context,
            "dtype": "float32",
            "depformer_runs": plan.depformer,
        },
    }


def _write(plan: Plan, model: LMModel, record: Record, result: dict[str, Any]) -> None:
    size = result["model"]
    subtitle = (
        f"Random weights: cost, not quality of speech. dim {size['dim']}, {size['layers']} layers, "
        f"context {size['context']}, float32, {result['device']}, {plan.threads} CPU thread(s); "
        f"{_system(plan)}, seed {plan.seed}"
    )
    assert model.context is not None
    context = model.context
    text = json.dumps(result, indent=2) + "\n"
    write_whole(
        {
            plan.out / "demo.png": lambda path: draw(record, context, subtitle, path),
            plan.out / "demo.json": lambda path: path.write_text(text, encoding="utf-8"),
        }
    )


def _system(plan: Plan) -> str:
    config = plan.config
    named = "" if config.preset is None else f"preset {config.preset}, "
    windows = {None: "the whole context", 0: "no window"}
    return f"{named}{windows.get(config.recent, f'recent {config.recent}')}, memory {config.memory}"


def _say(plan: Plan, model: LMModel, result: dict[str, Any]) -> None:
    console = Console()
    console.print(table(result))
    context, agreed = model.context or 0, result["frames_with_the_same_text"]
    console.print(
        f"Both models chose the same text in the first {agreed} of {plan.frames} frames "
        f"(patched: {_system(plan)})."
    )
    if plan.frames < context:
        console.print(
            f"Note: {plan.frames} frames are less than the stock context of {context}; the stock "
            f"model has forgotten nothing yet. The default of 6000 is twice the context."
        )
    recent = plan.config.recent
    if isinstance(recent, int) and recent < context:
        console.print(
            "The patch's own cost per step weighs less the wider the layers are: here "
            f"{model.dim}, in Moshi 7B 4096."
        )
    if recent == 0:
        console.print("Until it is trained, a TTT layer adds nothing to what passes through it.")
    if not plan.depformer:
        console.print(
            "A step is the temporal transformer's, which is what is patched; add --depformer for "
            "Moshi's second transformer."
        )
    console.print("All weights are random: this shows cost, not quality of speech.")
    for name in ("demo.png", "demo.json"):
        console.print(f"Written: {plan.out / name}", soft_wrap=True)
