"""Adapters that an evaluation needs: trained once, kept, and reused."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from moshi.models.lm import LMModel
from torch import Tensor

from ttt_cache.adapter import CONFIG_NAME, WEIGHTS_NAME, save_adapter
from ttt_cache.config import CacheConfig
from ttt_cache.patch import adapter_parameters, patch
from ttt_cache.training.distill import distill

from .arms import described
from .checkpoint import key_of, lock
from .hashes import adapter_hash, base_hash
from .lasting import lasting, slow_down
from .recipe import Course, Recipe
from .tune import learn, tuning

if TYPE_CHECKING:
    from .source import Source

HISTORY = "training.json"
FORMAT = 1  # changes when the same recipe no longer gives the same adapter


def adapter_for(
    lm: LMModel,
    source: Source,
    settings: Mapping[str, Any],
    recipe: Recipe,
    folder: Path,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """The adapter that this recipe gives, trained now unless it was before.

    It stands in a folder named after everything that makes it: the weights of the base model, the
    settings, the recipe, the source and the seed. A training that is killed leaves no such
    folder; what it had begun is removed by the next one of the same adapter.

    Args:
        lm: not patched; it is not patched afterwards either, and its weights are as they were.
        folder: where adapters are kept; made if needed.

    Returns:
        the adapter's folder, for `ttt_cache.load_adapter`; beside it stands `training.json`.

    Raises:
        ValueError: the settings do not fit the model, or leave nothing to train; the source's
            conversations are too short; or files of a kept adapter are missing.
        RuntimeError: a loss was not finite.
    """
    require_lessons(source, recipe)
    config = CacheConfig.from_fields(settings)
    made = {
        "format": FORMAT,
        "base": base_hash(lm),
        "settings": described(lm, config),
        "recipe": recipe.made(),
        "source": source.name,
        "seed": seed,
    }
    kept = folder / key_of(made)
    with lock(folder / f".{kept.name}.lock"):
        if not kept.exists():
            with _whole(kept) as unfinished:
                began = time.perf_counter()
                history = _train(lm, source, config, recipe, seed, unfinished, progress)
                history |= {"adapter": adapter_hash(unfinished), "made": made}
                history["seconds"] = time.perf_counter() - began
                history["date"] = datetime.now(UTC).isoformat(timespec="seconds")
                (unfinished / HISTORY).write_text(json.dumps(history) + "\n", encoding="utf-8")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (kept / name).is_file():
            raise ValueError(
                f"{kept} is damaged, it has no {name}; delete it, and the same command trains the "
                "adapter again"
            )
    return kept


def require_lessons(source: Source, recipe: Recipe) -> None:
    """Raise `ValueError` if a source's conversations are shorter than a recipe's sequences."""
    longest = max((frames for frames, *_ in recipe.lessons), default=0)
    if source.longest is not None and source.longest < longest:
        raise ValueError(
            f"{source.name}: sequences of {longest} frames are to be learned from, and what there "
            f"is to train on has {source.longest} frames together"
        )


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to fill, which is renamed to `folder` once it is complete, and else removed.

    Only for who holds the lock of `folder`: what stands there unfinished is of a killed process.
    """
    unfinished = folder.with_name(f".training-{folder.name}")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir()
    try:
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _train(
    lm: LMModel,
    source: Source,
    config: CacheConfig,
    recipe: Recipe,
    seed: int,
    folder: Path,
    progress: bool,
) -> dict[str, Any]:
    """Writes the adapter into `folder`; returns what was seen on the way."""
    frozen = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    lm.requires_grad_(False)
    history: dict[str, Any] = {"distill": {}, "tune": [], "last": []}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            handle = patch(lm, config=config)
        with handle:
            if not adapter_parameters(lm):
                raise ValueError(f"settings: memory={config.memory!r} has nothing to train")
            if recipe.distill.steps:
                history["distill"] = _distill(lm, source, recipe.distill, seed, progress)
            if recipe.tune.steps:
                losses = tuning(lm, handle, _batches(source, recipe.tune, seed + 1), recipe)
                history["tune"] = learn(lm, handle, recipe.tune, losses, "tune", progress)
            if recipe.last.steps:
                slow_down(handle, recipe.slower)
                # Closed before the patch is removed: it holds the caches while it waits.
                with closing(lasting(lm, handle, source, recipe, seed + 2)) as losses:
                    history["last"] = learn(lm, handle, recipe.last, losses, "last", progress)
            save_adapter(lm, folder)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    return history


def _distill(
    lm: LMModel, source: Source, course: Course, seed: int, progress: bool
) -> dict[int, list[float]]:
    device = next(lm.parameters()).device
    batches = ((codes.to(device),) for codes in _batches(source, course, seed))
    given = {name: value for name, value in asdict(course).items() if name != "stages"}
    return distill(lm, batches, steps=course.steps, progress=progress, **given).errors


def _batches(source: Source, course: Course, seed: int) -> Iterator[Tensor]:
    """Every stage draws conversations of its own."""
    return chain.from_iterable(
        source.batches(rows, frames, steps, 1000 * seed + stage)
        for stage, (frames, rows, steps) in enumerate(course.stages)
    )
