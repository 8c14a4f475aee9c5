"""From a manifest to a finished cache, once; a run that was stopped goes on where it was."""

from __future__ import annotations

import errno
import hashlib
import math
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from ttt_cache.checks import whole_number

from .check import Recording, check_clips
from .codec import encode, fingerprint
from .facts import LMFacts
from .lock import only_writer
from .manifest import read_manifest
from .sessions import join
from .shards import INDEX, Index, TokenCache, complete, verify, write_index, write_shard
from .text import text_stream
from .transcript import read_transcript

if TYPE_CHECKING:
    from moshi.models.compression import MimiModel
    from sentencepiece import SentencePieceProcessor


def prepare(
    manifest: Path | str,
    folder: Path | str,
    mimi: MimiModel,
    tokenizer: SentencePieceProcessor,
    facts: LMFacts,
    shard_frames: int = 90_000,
    progress: bool = True,
) -> TokenCache:
    """Check a data set, tokenise what of it is not yet in the cache, and open the cache.

    Everything is checked before anything is tokenised. One process does this; others open the
    result with `TokenCache.open`.

    Args:
        manifest: moshi-finetune's jsonl.
        folder: of the cache; made if it is not there.
        mimi: the codec, on any device; its number of codebooks is set to the model's.
        tokenizer: of the text.
        facts: of the model that will be trained.
        shard_frames: frames after which a shard is closed, at 12.5 per second: what a kill may cost
            (2 hours of sound). An unfinished cache goes on with the size that it was begun with.
        progress: show bars on stderr.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: a manifest, sound file or transcript is wrong, codec or tokenizer do not fit the
            model, or the cache was made from something else or is damaged; the message names files
            and fields.
        RuntimeError: another process is writing this cache.
        OSError: the disk is or would become full; finished shards stay.
    """
    shard_frames = whole_number("shard_frames", shard_frames, 1)
    _fit(mimi, tokenizer, facts)
    mimi.set_num_codebooks(facts.dep_q)
    clips, folder = read_manifest(manifest), Path(folder)
    with _bars(progress) as bars:
        listed = bars.track(clips, description="Checking recordings")
        recordings = check_clips(listed, mimi.sample_rate, mimi.frame_rate, facts.channels)
        folder.mkdir(parents=True, exist_ok=True)
        job = _Job(folder, recordings, mimi, tokenizer, facts)
        # To read needs no lock: a finished cache may be shared, and read-only.
        with nullcontext() if complete(folder) else only_writer(folder, "this cache"):
            return TokenCache(folder, job.run(shard_frames, bars))


@dataclass(frozen=True)
class _Job:
    """What goes into a cache, and where that is."""

    folder: Path
    recordings: Sequence[Recording]
    mimi: MimiModel
    tokenizer: SentencePieceProcessor
    facts: LMFacts

    def run(self, shard_frames: int, bars: Progress) -> Index:
        """Make the shards that are not there."""
        index = self._index(shard_frames)
        size = self.mimi.frame_size
        frames = [math.ceil(recording.wav.samples / size) for recording in self.recordings]
        plan = join(frames, index.shard_frames)
        index.total_shards = len(plan)
        missing = [number for number in range(len(plan)) if number not in index.shards]
        left = sum(frames[i] for number in missing for i in plan[number])
        self._room(left)
        if missing:
            for rest in self.folder.glob(".????????.*"):
                rest.unlink()  # of a run that was killed while writing
            write_index(self.folder, index)
        hours = sum(frames) / self.mimi.frame_rate / 3600
        task = bars.add_task(f"Tokenising {hours:.3g} h of sound", total=sum(frames))
        bars.advance(task, sum(frames) - left)
        for number in missing:
            codes = []
            for i in plan[number]:
                codes.append(self._codes(self.recordings[i], frames[i]))
                bars.advance(task, frames[i])
            names = [self.recordings[i].name for i in plan[number]]
            write_shard(self.folder, index, number, plan[number].start, names, codes)
        return index

    def _index(self, shard_frames: int) -> Index:
        """The index of what is there, all of it verified, or a new one."""
        new = Index(self._made_from(), self.facts.codebooks, shard_frames, total_shards=0)
        if not (self.folder / INDEX).exists():
            return new
        index = Index.read(self.folder)
        for name, digest in new.fingerprint.items():
            if index.fingerprint.get(name) != digest:
                raise ValueError(
                    f"{self.folder / INDEX}: the cache was made from other {name}: give another "
                    f"folder, or delete {self.folder} and tokenise anew"
                )
        for number, shard in list(index.shards.items()):
            if not (self.folder / shard.file).exists():
                del index.shards[number]
            else:
                verify(self.folder, shard)
        return index

    def _made_from(self) -> dict[str, str]:
        facts = self.facts
        recordings = [(r.name, r.wav.samples, r.wav.kind, r.digest) for r in self.recordings]
        model = (facts.n_q, facts.dep_q, facts.text_padding, facts.end_of_text_padding)
        return {
            "recordings": _sha256(repr(recordings).encode()),
            "weights of Mimi": fingerprint(self.mimi),
            "text tokenizer": _sha256(self.tokenizer.serialized_model_proto()),
            "codebooks or padding tokens of the model": _sha256(repr(model).encode()),
        }

    def _room(self, frames: int) -> None:
        need = frames * self.facts.codebooks * 4
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise OSError(
                errno.ENOSPC,
                f"the codes still to make need {need / 1e6:.1f} MB, {free / 1e6:.1f} MB are free",
                str(self.folder),
            )

    def _codes(self, recording: Recording, frames: int) -> Tensor:
        """Text and sound of a recording, int32 `[K, frames]`."""
        wav = recording.wav
        words = read_transcript(recording.transcript, wav.seconds)
        text = text_stream(words, frames, self.mimi.frame_rate, self.tokenizer, self.facts)

        def read(start: int, count: int) -> np.ndarray:
            return wav.read(start, count)[: self.facts.channels]

        return torch.cat([text[None], encode(self.mimi, read, wav.samples)])


def _fit(mimi: MimiModel, tokenizer: SentencePieceProcessor, facts: LMFacts) -> None:
    """Check that codec and tokenizer are such as the model was made for."""
    if mimi.total_codebooks < facts.dep_q or mimi.cardinality != facts.card:
        raise ValueError(
            f"mimi must have at least {facts.dep_q} codebooks of {facts.card} codes (the model's "
            f"dep_q and card), it has {mimi.total_codebooks} of {mimi.cardinality}"
        )
    if tokenizer.vocab_size() > facts.text_card:
        raise ValueError(
            f"tokenizer must have at most {facts.text_card} tokens (the model's text_card), it has "
            f"{tokenizer.vocab_size()}"
        )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _bars(show: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not show,
    )
