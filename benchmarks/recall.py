"""What a trained memory recalls: facts that left the window, beside full context and window alone.

A two-layer Moshi transformer (`recall_model.py`) learns to answer questions about key-value facts
(`recall_task.py`) with full context, on sequences of up to 512 tokens, and is then frozen. Both
its layers get a hierarchical cache with a window of 64 and 16 virtual tokens, and only that is
trained, twice: by `ttt_cache.distill` alone, on the layers' full-context outputs, without being
told what is asked or right; and by some of that and then, from end to end, on the answers.

There are as many facts to hold as virtual tokens. `--keys 32` asks for twice as many: then no
memory can give every attention head what full context gives it, one value for each virtual token,
and distillation, which wants just that, cannot end well. From end to end, heads can share the work.

Marked are answers whose fact is older than anything a window can hold, `recent + chunk - 1`
tokens. All arms are asked the same questions:

| arm | what the frozen model attends to |
|---|---|
| full cache | everything, as stock Moshi does |
| window of N | the last N tokens; 79 is the most that an arm with a memory ever sees exactly |
| memory reset | window and a memory that learns but is never read |
| mean, cluster | window and 1 or 16 virtual tokens that need no training |
| trained, distilled | window and 16 virtual tokens read from the trained memory |

One thread does all of it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import environment, publish, quiet_process
from recall_model import BASE, SIZES, Clock, Lessons, Marks, Recaller, base_model, train
from recall_model import marks as marks_of
from recall_task import Batch, Task
from rich.console import Console
from rich.table import Table

import ttt_cache
from ttt_cache.evaluation.lines import Line
from ttt_cache.files import write_whole

TRAINED = 512  # length of the longest sequences in training
LENGTHS = (TRAINED, 2 * TRAINED, 4 * TRAINED, 8 * TRAINED)
WINDOW: dict[str, Any] = {"recent": 64, "virtual": 16, "chunk": 16}
MEMORY: dict[str, Any] = {"memory_heads": 4, "memory_dim": 32, "hidden_dim": 128}
FAR = WINDOW["recent"] + WINDOW["chunk"] - 1  # the age from which no window holds a fact
CONTROLS: dict[str, dict[str, Any]] = {
    "window of 64": {"recent": 64, "memory": "none"},
    f"window of {FAR}": {"recent": FAR, "memory": "none"},
    "memory reset": {**WINDOW, **MEMORY, "reset_memory": True},
    "mean": {**WINDOW, "memory": "mean"},
    "cluster": {**WINDOW, "memory": "cluster"},
}
# Stage 0, distillation; stage 1, the answers. Small batches: many steps teach more than large ones.
STAGES = {
    "trained": (
        Lessons(((320, 2, 2000),), lr=3e-3),
        Lessons(((TRAINED, 2, 3200),), lr=2e-3),
    ),
    "distilled": (Lessons(((320, 2, 3000), (TRAINED, 2, 1500)), lr=3e-3),),
}
SHARES = {"trained": 0.99, "distilled": 0.95}  # of full context's right answers
BUDGET = 20 * 60  # seconds


@dataclass(frozen=True)
class Report:
    """Of one arm: marks by length, and if it was trained how, when and with what."""

    marks: dict[int, Marks]
    training: dict[str, Any] = field(default_factory=dict)


def examine(model: Recaller, exams: dict[int, list[Batch]]) -> dict[int, Marks]:
    return {length: marks_of(model, exam, WINDOW["recent"], FAR) for length, exam in exams.items()}


def end_to_end(model: Recaller, lessons: Lessons, task: Task, seed: str) -> Any:
    return train(model, ttt_cache.adapter_parameters(model), lessons, task, seed)


def distilled(model: Recaller, lessons: Lessons, task: Task, seed: str) -> dict[int, list[float]]:
    batches = ((batch.tokens,) for batch in lessons.batches(task, seed))
    given = {name: value for name, value in asdict(lessons).items() if name != "stages"}
    return ttt_cache.distill(model, batches, steps=lessons.steps, **given).errors


def teach(model: Recaller, task: Task, name: str, seed: int) -> list[Any]:
    """Every stage of `name`, and what each logged."""
    return [
        learn(model, lessons, task, f"{name}, stage {stage}, seed {seed}")
        for stage, (learn, lessons) in enumerate(
            zip((distilled, end_to_end), STAGES[name], strict=False)
        )
    ]


def learned(
    model: Recaller,
    task: Task,
    name: str,
    exams: dict[int, list[Batch]],
    record: Any,
    folder: Path,
) -> Report:
    """Mark a trained memory: the one in `folder` if it was trained alike, else a new one."""
    seed, history = record["seed"], folder / "training.json"
    made = [
        name,
        WINDOW,
        MEMORY,
        [asdict(lessons) for lessons in STAGES[name]],
        asdict(task),
        seed,
    ]
    kept = json.loads(history.read_text()) if history.exists() else {}
    if kept.get("made") == json.loads(json.dumps(made)):
        with ttt_cache.load_adapter(model, folder):
            return Report(examine(model, exams), kept)
    torch.manual_seed(seed)
    with ttt_cache.patch(model, **WINDOW, **MEMORY):
        clock = Clock()
        log = teach(model, task, name, seed)
        kept = {"made": made, **clock.read(), **record, "log": log}
        ttt_cache.save_adapter(model, folder)
        write_whole({history: lambda path: path.write_text(json.dumps(kept, indent=2) + "\n")})
        return Report(examine(model, exams), kept)


def figures(arms: dict[str, Report], task: Task, base_seconds: dict[str, float]) -> list[Line]:
    full, floor = arms["full cache"].marks, arms[f"window of {FAR}"].marks
    asked = min(marks.far_asked for arm in arms.values() for marks in arm.marks.values())
    lines = [
        Line("far answers marked, of each arm and length", asked, at_least=4_000),
        Line("base model: training, processor", base_seconds["processor_s"], "s"),
        Line("a guess", 1 / task.values),
        Line(f"window of {FAR}, far, {TRAINED} tokens", floor[TRAINED].far),
        Line(f"full cache, far, {TRAINED} tokens", full[TRAINED].far),
    ]
    for name, arm in arms.items():
        if name in STAGES:
            lines += figures_of(name, arm, full)
    return lines


def figures_of(name: str, arm: Report, full: dict[int, Marks]) -> list[Line]:
    """What was asked of an arm that is trained."""
    long, share = LENGTHS[-1], SHARES[name]
    more = round((arm.marks[long].far - full[long].far) * full[long].far_asked)
    ratio = arm.marks[TRAINED].far / full[TRAINED].far
    lines = [Line(f"{name} / full, far, {TRAINED} tokens", ratio, at_least=share)]
    if name == "trained":
        lines.append(Line(f"{name}: right answers beyond full's, {long}", more, at_least=1))
    wall, processor = (arm.training[f"{clock}_s"] for clock in ("wall", "processor"))
    # Of one thread: what the wall would show if nobody else used the machine.
    lines.append(Line(f"{name}: training, processor", processor, "s", BUDGET))
    return [*lines, Line(f"{name}: training, wall", wall, "s")]


def table_of(arms: dict[str, Report]) -> Table:
    table = Table(title=f"recall: right answers, facts at least {FAR} tokens old (in the window)")
    table.add_column("arm", no_wrap=True)
    for length in LENGTHS:
        table.add_column(f"{length:,} tokens", justify="right")
    for name, arm in arms.items():
        table.add_row(name, *(f"{m.far:.4f} ({m.near:.4f})" for m in arm.marks.values()))
    return table


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=5_000, help="far ones, of each length")
    parser.add_argument("--keys", type=int, default=16, help="facts to hold, as virtual tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the memory; the base's is 0")
    parser.add_argument("--arms", nargs="*", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--folder", type=Path, default=Path("out/recall"), help="keeps weights")
    parser.add_argument("--out", type=Path, default=Path("out/recall.json"))
    return parser.parse_args()


def main() -> None:
    quiet_process()
    options = parse()
    record = environment(options.seed, "float32")
    task = Task(keys=options.keys, far=FAR)
    model, base_seconds = base_model(options.folder / f"base-{task.keys}.safetensors", task)
    exams = {length: task.exam(length, options.questions) for length in LENGTHS}
    arms = {"full cache": Report(examine(model, exams))}
    for name, given in CONTROLS.items():
        with ttt_cache.patch(model, **given):
            arms[name] = Report(examine(model, exams))
    for name in options.arms:
        folder = options.folder / f"{name}-{task.keys}-{options.seed}"
        arms[name] = learned(model, task, name, exams, record, folder)
    settings = {
        "task": asdict(task),
        "model": {**SIZES, "training": asdict(BASE), **base_seconds},
        "cache": {**WINDOW, **MEMORY},
        "controls": CONTROLS,
    }
    details = {
        name: {
            "marks": {length: marks._asdict() for length, marks in arm.marks.items()},
            "training": arm.training,
        }
        for name, arm in arms.items()
    }
    publish(
        "recall", options.out, record, settings, figures(arms, task, base_seconds), arms=details
    )
    Console(width=110).print(table_of(arms))


if __name__ == "__main__":
    main()
