"""What is measured of what, in order; every result is kept as soon as it is there."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ttt_cache.config import CacheConfig

from .adapters import adapter_for, require_lessons
from .arms import Arm, described
from .checkpoint import Results, key_of, lock
from .circumstances import machine
from .hashes import adapter_hash, base_hash
from .measures import Cost, Measure, Run, Speak
from .recipe import DEFAULT, Recipe
from .source import Conversations, Piece, Source
from .subject import Subject, frames_seen

FORMAT = 1  # changes when the same measure no longer gives the same result
TIMED = Cost, Speak  # measures that hold times: these are those of one machine
DATES = "measured"  # beside the results of a point: when each was measured


@dataclass(frozen=True)
class Point:
    """One arm in one experiment.

    Attributes:
        name: its line in the table.
        measures: what is measured of it.
        x: its place on the axis of a sweep.
        series: the curve that it belongs to in a sweep, the arm by default.
        recipe: how its adapter is trained; `None`: as shipped or given by the user, else `DEFAULT`.
        source: what it is measured on, the subject's by default.
        taught: what it is trained on, by default what the subject says.
    """

    name: str
    arm: Arm
    measures: tuple[Measure, ...]
    x: float | None = None
    series: str = ""
    recipe: Recipe | None = None
    source: Source | None = None
    taught: Source | None = None


Found = dict[str, dict[str, Any]]  # by point and by measure; `DATES` stands among these


class Bench:
    """Measures points and keeps what comes out.

    Args:
        folder: where results are kept.
        adapters: where adapters are kept.
        console: for what a person sees meanwhile.
    """

    def __init__(
        self, subject: Subject, folder: Path, adapters: Path, console: Console | None = None
    ) -> None:
        self.subject, self.folder, self.adapters = subject, folder, adapters
        self.results = Results(folder)
        self.console = console or Console(stderr=True)
        self.measured = self.wanted = 0  # results of this run: on the disk, and all

    def evaluate(self, points: Sequence[Point], only: Collection[str] | None = None) -> Found:
        """The results of all points; what is there already is not measured again.

        Several processes may work on the same folder: a point that another one is working on is
        left for last, and is then there.

        Args:
            only: names of points; all by default.

        Raises:
            ValueError: conversations are too short to train on or to measure; files are damaged.
        """
        todo = [point for point in points if only is None or point.name in only]
        for point in todo:  # at once, not when its turn comes after hours
            if point.arm.trained and self._ready(point) is None:
                require_lessons(*self._lessons(point))
        found: Found = {}
        self.wanted = sum(len(point.measures) for point in todo)
        with self._bar(self.wanted) as (bar, task):
            for wait in (False, True):
                for point in [point for point in todo if point.name not in found]:
                    with lock(self.lock_of(point), wait, bar.console.print) as held:
                        if held:
                            found[point.name] = self._measure(point, bar, task)
        return {point.name: found[point.name] for point in todo}

    def lock_of(self, point: Point) -> Path:
        """What a process holds while it measures a point: another experiment's is another one."""
        measures = [[type(measure).__name__, as_json(measure)] for measure in point.measures]
        return self.folder / f".{key_of({'point': point.name, 'measures': measures})}.lock"

    def kept(self) -> str:
        """What an interrupted evaluation does not have to do again."""
        return (
            f"{self.measured} of {self.wanted} results, and every adapter that was trained, are "
            f"kept in {self.adapters.parent}; the same command goes on from there"
        )

    def adapter(self, point: Point) -> Path | None:
        """The trained weights of a point, trained now if need be; `None` if it takes none."""
        if not point.arm.trained:
            return None
        if (ready := self._ready(point)) is not None:
            return ready
        source, recipe = self._lessons(point)
        return adapter_for(
            self.subject.lm,
            source,
            point.arm.lesson,
            recipe,
            self.adapters,
            self.subject.seed,
            progress=self.console.is_terminal,
        )

    def _ready(self, point: Point) -> Path | None:
        """The adapter of a point that is not trained here."""
        return None if point.recipe else self.subject.trained_already(point.arm)

    def _lessons(self, point: Point) -> tuple[Source, Recipe]:
        """What the adapter of a point learns from, and how."""
        arm, subject = point.arm, self.subject
        recipe = (point.recipe or arm.recipe or DEFAULT).stretched(subject.context)
        # Half of a sequence, if the context allows, is to be remembered.
        least = min(2 * frames_seen(arm.lesson), subject.context)
        return point.taught or subject.taught or subject.source, recipe.beyond(least)

    def _measure(self, point: Point, bar: Progress, task: Any) -> dict[str, Any]:
        bar.update(task, what=f"{point.name}: adapter")
        subject, adapter = self.subject, self.adapter(point)
        source = point.source or subject.source
        common = {
            "format": FORMAT,
            "base": base_hash(subject.lm),
            "adapter": adapter_hash(adapter),
            "source": source.name,
            "seed": subject.seed,
        }
        found: dict[str, Any] = {DATES: {}}
        for measure in point.measures:
            arm = point.arm.costed if isinstance(measure, Cost) else point.arm
            config = CacheConfig.from_fields(arm.settings)
            made = {**common, "arm": described(subject.lm, config)}
            made |= {"measure": type(measure).__name__, "of": as_json(measure)}
            if isinstance(measure, TIMED):
                made["machine"] = machine(subject.lm.device)
            kept = self.results.get(made)
            if kept is None:
                bar.update(task, what=f"{point.name}: {measure.name}")
                began = time.perf_counter()
                counted = _Counted(source, bar, task, f"{point.name}: {measure.name}")
                with arm.on(subject.lm, adapter) as handle:
                    run = Run(subject.lm, handle, counted, subject.seed)
                    result = as_json(measure(run))
                kept = self.results.put(made, result, time.perf_counter() - began)
            found[measure.name], found[DATES][measure.name] = kept
            self.measured += 1
            bar.advance(task)
        return found

    @contextmanager
    def _bar(self, total: int) -> Iterator[tuple[Progress, Any]]:
        with Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[what]}"),
            console=self.console,
            refresh_per_second=2,
        ) as bar:
            yield bar, bar.add_task("", total=total, what="")


class _Counted:
    """Conversations that say how far they have been read."""

    def __init__(self, source: Conversations, bar: Progress, task: Any, what: str) -> None:
        self.name, self._source, self._what = source.name, source, what
        self._bar, self._task = bar, task

    def pieces(self, rows: int, frames: int, seed: int) -> Iterator[Piece]:
        read = 0
        for piece in self._source.pieces(rows, frames, seed):
            yield piece
            read += piece.codes.shape[2]
            self._bar.update(self._task, what=f"{self._what}, frame {read:,} of {frames:,}")


def as_json(value: Any) -> Any:
    """Plain JSON values: what is not a number is `None`, keys are strings."""
    if is_dataclass(value) and not isinstance(value, type):
        return as_json(asdict(value))
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, float):
        return value if value - value == 0 else None
    return value
