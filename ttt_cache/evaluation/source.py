"""Where the conversations of an evaluation come from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from moshi.models.compression import MimiModel
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from ttt_cache.checks import whole_number
from ttt_cache.testbed import vocabulary as v
from ttt_cache.testbed.stream import LEVELS, NONE, Conversation, Level, collate, draw
from ttt_cache.training.data import LMFacts, TokenCache, prepare
from ttt_cache.training.data.sessions import join

SEGMENT = 256  # frames that are in memory, and go through a model, at a time
MARKS = "answer", "age", "load", "rewritten"  # of the testbed's frames


class Piece(NamedTuple):
    """The next S frames of B conversations.

    Attributes:
        codes: int64 `[B, K, S]`, not delayed: text, Moshi's codebooks, the user's.
        marks: what is known of each frame, int64 `[B, S]`; empty for data without marks. As in
            `ttt_cache.testbed.stream.Frame`: `answer`, `age`, `load`, `rewritten`; and `voice`:
            Moshi's voice where it begins to speak again, else `NONE`.
    """

    codes: Tensor
    marks: dict[str, Tensor]


class Conversations(Protocol):
    """What is measured on: of any length, made or read while it is needed."""

    @property
    def name(self) -> str:
        """Tells sources that give other conversations apart."""
        ...

    def pieces(self, rows: int, frames: int, seed: int) -> Iterator[Piece]:
        """`rows` conversations of `frames` frames in pieces of at most `SEGMENT`, in order.

        The same seed gives the same conversations.
        """
        ...


class Source(Conversations, Protocol):
    """Conversations to measure and to train on."""

    @property
    def longest(self) -> int | None:
        """Frames of the longest row that `batches` has; `None`: of any length."""
        ...

    def batches(self, rows: int, frames: int, steps: int, seed: int) -> Iterator[Tensor]:
        """What to train on: `steps` times codes `[rows, K, frames]` as in `Piece`."""
        ...


class TestbedSource:
    """The testbed's generated stream.

    Args:
        levels: names in `ttt_cache.testbed.stream.LEVELS`, or levels; each conversation is of one
            of them, drawn at random.

    Raises:
        ValueError: there is no level of that name, or none is given.
    """

    __test__ = False  # its name begins like a test's
    longest = None

    def __init__(self, *levels: str | Level) -> None:
        if not levels:
            raise ValueError(f"levels must name at least one of {', '.join(LEVELS)}, got none")
        for level in levels:
            if isinstance(level, str) and level not in LEVELS:
                raise ValueError(f"levels must be of {', '.join(LEVELS)}, got {level!r}")
        self.levels = [LEVELS[level] if isinstance(level, str) else level for level in levels]
        self.name = f"testbed {'+'.join(map(str, levels))}"

    def pieces(self, rows: int, frames: int, seed: int) -> Iterator[Piece]:
        """As `Source.pieces`; a row is the same whatever the number of rows and of frames."""
        rows, frames = whole_number("rows", rows, 1), whole_number("frames", frames, 1)
        rngs = [random.Random(f"{self.name}, seed {seed}, row {row}") for row in range(rows)]
        return _pieces([Conversation(rng.choice(self.levels), rng) for rng in rngs], frames)

    def batches(self, rows: int, frames: int, steps: int, seed: int) -> Iterator[Tensor]:
        """As `Source.batches`: conversations from their first frame, none of them in `pieces`."""
        rows, frames = whole_number("rows", rows, 1), whole_number("frames", frames, 1)
        rng = random.Random(f"{self.name}, seed {seed}, lessons")
        return (draw(rows, frames, self.levels, rng).codes for _ in range(steps))


def _pieces(talks: list[Conversation], frames: int) -> Iterator[Piece]:
    voices = torch.tensor([[talk.moshi_voice] for talk in talks])
    spoken = torch.zeros(len(talks), 1, dtype=torch.bool)  # whether Moshi's voice was heard yet
    for start in range(0, frames, SEGMENT):
        codes, *rest = collate([talk.take(min(SEGMENT, frames - start)) for talk in talks])
        marks: dict[str, Tensor] = dict(zip(MARKS, rest, strict=True))
        speaks = codes[:, v.MOSHI] != v.SILENCE
        known = torch.cat([spoken, speaks], dim=1).cummax(dim=1).values
        begins = (marks["age"] > 0) & (marks["answer"] == NONE) & known[:, :-1]
        marks["voice"] = torch.where(begins, voices, NONE)
        spoken = known[:, -1:]
        yield Piece(codes, marks)


class RecordedSource:
    """Recordings in moshi-finetune's format, tokenised once.

    Every second recording, from the first on, is measured on, and the others are trained on, so
    nothing is measured on what it was trained on. Recordings shorter than asked for are joined to
    the next ones; of longer ones the first frames are taken.

    Args:
        cache: the tokenised recordings.
        name: tells them apart from others.
    """

    def __init__(self, cache: TokenCache, name: str) -> None:
        self.cache, self.name = cache, name

    @classmethod
    def prepare(
        cls,
        manifest: Path | str,
        folder: Path | str,
        mimi: MimiModel,
        tokenizer: SentencePieceProcessor,
        facts: LMFacts,
    ) -> RecordedSource:
        """Check and tokenise a data set, or go on with it; see `ttt_cache.training.data.prepare`.

        Args:
            manifest: moshi-finetune's jsonl.
            folder: of the tokens.
        """
        cache = prepare(manifest, folder, mimi, tokenizer, facts)
        digests = " ".join(digest[:8] for digest in cache.fingerprint.values())
        return cls(cache, f"{Path(manifest).name} {digests}")

    @property
    def longest(self) -> int:
        """As `Source.longest`: all that are trained on, joined."""
        return sum(self.cache.frames[1::2])

    def pieces(self, rows: int, frames: int, seed: int) -> Iterator[Piece]:
        """As `Source.pieces`, without marks.

        Raises:
            ValueError: the recordings are too few or too short.
        """
        rows, frames = whole_number("rows", rows, 1), whole_number("frames", frames, 1)
        groups = self._groups(0, frames)
        if len(groups) < rows:
            raise ValueError(
                f"{self.name}: {rows} conversations of {frames} frames were asked for, every "
                f"second recording gives {len(groups)}; ask for fewer or shorter ones"
            )
        chosen = random.Random(f"{self.name}, seed {seed}").sample(groups, rows)
        return _cut([self._codes(group, 0, frames) for group in chosen])

    def batches(self, rows: int, frames: int, steps: int, seed: int) -> Iterator[Tensor]:
        """As `Source.batches`, from anywhere in the recordings.

        Raises:
            ValueError: the recordings are too few or too short.
        """
        rows, frames = whole_number("rows", rows, 1), whole_number("frames", frames, 1)
        groups = self._groups(1, frames)
        if not groups:
            raise ValueError(
                f"{self.name}: every second recording is trained on, and together these have "
                f"fewer than {frames} frames"
            )
        rng = random.Random(f"{self.name}, seed {seed}, lessons")
        starts = [sum(self.cache.frames[i] for i in group) - frames + 1 for group in groups]

        def row() -> Tensor:
            (index,) = rng.choices(range(len(groups)), starts)
            return self._codes(groups[index], rng.randrange(starts[index]), frames)

        return (torch.stack([row() for _ in range(rows)]) for _ in range(steps))

    def _groups(self, first: int, least: int) -> list[list[int]]:
        """Every second recording, joined so that each group has at least so many frames."""
        numbers = range(len(self.cache.frames))[first::2]
        lengths = [self.cache.frames[number] for number in numbers]
        groups = [
            group for group in join(lengths, least) if sum(lengths[i] for i in group) >= least
        ]
        return [[numbers[i] for i in group] for group in groups]

    def _codes(self, group: list[int], start: int, frames: int) -> Tensor:
        """`[K, frames]`, int64."""
        whole = torch.cat(list(self.cache.codes(group)), dim=1)
        return whole[:, start : start + frames].long()


def _cut(rows: list[Tensor]) -> Iterator[Piece]:
    for start in range(0, rows[0].shape[1], SEGMENT):
        yield Piece(torch.stack([row[:, start : start + SEGMENT] for row in rows]), {})
