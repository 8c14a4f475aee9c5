"""A small real Moshi transformer that answers questions, how it is trained and how it is marked."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from moshi.modules.transformer import StreamingTransformer
from recall_task import NONE, Batch, Task
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ttt_cache.evaluation.recipe import Course
from ttt_cache.files import write_whole
from ttt_cache.training.schedule import optimizer_for

SIZES: dict[str, Any] = {
    "d_model": 128,
    "num_heads": 4,
    "num_layers": 2,
    "dim_feedforward": 256,
    "context": 8192,  # beyond any sequence here: the full cache is really full
}
LOGGED = 50  # steps


@dataclass(frozen=True)
class Lessons(Course):
    """A course of training on sequences of a task."""

    def batches(self, task: Task, seed: str) -> Iterator[Batch]:
        rng = random.Random(seed)
        for length, rows, steps in self.stages:
            for _ in range(steps):
                yield task.draw(rows, length, rng)


BASE = Lessons(
    ((64, 64, 600), (128, 32, 300), (256, 16, 300), (512, 8, 1700)),
    lr=2e-3,
    weight_decay=0.01,
    pct_start=0.1,
)


class Clock:
    """Seconds since it was made: on the wall, and of processors, all threads together."""

    def __init__(self) -> None:
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {
            "wall_s": time.perf_counter() - self.wall,
            "processor_s": time.process_time() - self.processor,
        }


class Recaller(nn.Module):
    """Tokens `[B, T]` to a score for each value, `[B, T, values]`."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.embedding = nn.Embedding(task.vocabulary, SIZES["d_model"])
        self.transformer = StreamingTransformer(
            **SIZES, causal=True, positional_embedding="rope", gating="silu", norm="rms_norm_f32"
        )
        self.head = nn.Linear(SIZES["d_model"], task.values, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.transformer(self.embedding(tokens)))


def train(
    model: Recaller, parameters: list[nn.Parameter], lessons: Lessons, task: Task, seed: str
) -> list[dict[str, float]]:
    """Minimise the cross-entropy of the answers.

    Returns:
        for every 50 steps, their mean loss and the seconds so far.
    """
    given = (lessons.lr, lessons.weight_decay, lessons.steps, lessons.pct_start)
    optimizer, schedule = optimizer_for(parameters, *given)
    clock, log, losses = Clock(), [], []
    for step, batch in enumerate(lessons.batches(task, seed), 1):
        scores = model(batch.tokens).flatten(0, 1)
        loss = F.cross_entropy(scores, batch.answers.flatten(), ignore_index=NONE)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, lessons.max_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % LOGGED == 0:
            log.append({"step": step, "loss": sum(losses) / LOGGED, **clock.read()})
            print(f"{seed}: step {step} of {lessons.steps}, loss {log[-1]['loss']:.4f}", flush=True)
            losses.clear()
    optimizer.zero_grad()
    return log


def base_model(file: Path, task: Task) -> tuple[Recaller, dict[str, float]]:
    """The model, trained with full context and frozen, and the seconds that its training took.

    Args:
        file: keeps the weights. If they were made with these settings, nothing is trained.
    """
    torch.manual_seed(0)
    model = Recaller(task)
    made = json.dumps([asdict(BASE), asdict(task)])
    if file.exists():
        with safe_open(file, "pt") as kept:
            metadata = kept.metadata() or {}
        if metadata.get("made") == made:
            model.load_state_dict(load_file(file))
            return model.requires_grad_(False), json.loads(metadata["seconds"])
    clock = Clock()
    train(model, list(model.parameters()), BASE, task, "base")
    metadata = {"made": made, "seconds": json.dumps(clock.read())}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole({file: lambda path: save_file(model.state_dict(), path, metadata)})
    return model.requires_grad_(False), json.loads(metadata["seconds"])


class Marks(NamedTuple):
    """Shares of right answers, and of how many: far ones, and near ones, which are in a window."""

    far: float
    near: float
    far_asked: int
    near_asked: int


@torch.no_grad()
def marks(model: Recaller, exam: list[Batch], near: int, far: int) -> Marks:
    """Mark answers of an age of at least `far`, and of less than `near`."""
    right, asked = [0, 0], [0, 0]
    for batch in exam:
        correct = model(batch.tokens).argmax(-1) == batch.answers
        for index, kind in enumerate((batch.asked(far), batch.asked(0, near - 1))):
            asked[index] += int(kind.sum())
            right[index] += int((correct & kind).sum())
    return Marks(right[0] / asked[0], right[1] / asked[1], *asked)
