"""How conversations may go on, rightly and wrongly, for their likelihoods to be compared."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ttt_cache.checks import whole_number
from ttt_cache.testbed import vocabulary as v
from ttt_cache.testbed.stream import Conversation, Frame, Level, collate

FREE, OTHER, OLD, VOICE = "no key's", "another key's", "overwritten", "another voice"
RECORDING = "another recording"

TURNS = 4  # that Moshi is given at one place
LENGTH = 64  # frames of recordings that are compared, 5 s
REMEMBERED = 512  # frames of a conversation that filler is made of


Ways = list[list[Frame] | None]  # to go on with one conversation, the right one first


class Question(NamedTuple):
    """The right continuation of B conversations, and wrong ones by their kind.

    Attributes:
        good: codes `[B, K, n]`, not delayed.
        bad: by kind such codes, and bool `[B]`: the conversations that have a right and a wrong
            continuation of this kind; what stands in the others' place means nothing.
    """

    good: Tensor
    bad: dict[str, tuple[Tensor, Tensor]]


class Teller(Protocol):
    """Listens to conversations, and tells how they may go on."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of wrong continuations."""
        ...

    @property
    def places(self) -> int:
        """At how many places in a row, pieces apart, there are questions."""
        ...

    def hear(self, codes: Tensor) -> None:
        """The next frames, `[B, K, S]`."""
        ...

    def filler(self, frames: int) -> Tensor:
        """What comes before the questions, `[B, K, frames]`: the evidence leaves windows."""
        ...

    def questions(self, ahead: Tensor) -> Iterator[Question]:
        """Those at this place; `ahead` `[B, K, S]` is what really comes next."""
        ...


class RecordedTeller:
    """The true continuation of a recording, against those of the other conversations.

    Before them comes what was last heard in the next conversation, alike for the right one and the
    wrong ones, which are of neither: whose voice and words go on has left the window by then.

    Args:
        rows: conversations, at least 3.
    """

    kinds, places = (RECORDING,), 6

    def __init__(self, rows: int) -> None:
        self.rows = whole_number("rows of recordings", rows, 3)
        self.heard: Tensor | None = None

    def hear(self, codes: Tensor) -> None:
        parts = [codes] if self.heard is None else [self.heard, codes]
        self.heard = torch.cat(parts, dim=2)[:, :, -REMEMBERED:]

    def filler(self, frames: int) -> Tensor:
        """From the beginning again where more is wanted than is remembered."""
        assert self.heard is not None
        index = torch.arange(frames) % self.heard.shape[2]
        return self.heard.roll(-1, dims=0)[:, :, index]

    def questions(self, ahead: Tensor) -> Iterator[Question]:
        good, everywhere = ahead[:, :, :LENGTH], torch.ones(self.rows, dtype=torch.bool)
        for shift in range(1, self.rows - 1):  # the last one would be the filler's
            yield Question(good, {RECORDING: (good.roll(shift, dims=0), everywhere)})


class TestbedTeller:
    """Asks for facts and has Moshi speak, behind filler of the conversation's own.

    At a place every known key is asked for once. Instead of its value Moshi says, as wrong
    continuations, one that no key has (never told, in the manner of sWUGGY, a word against none;
    where all have been told, that of longest ago), that of another key, or the one that the key
    had before (in the manner of StoryCloze, an ending against another). And Moshi, given
    the turn, goes on in its voice or in another (agreement, in the manner of sBLIMP).
    """

    __test__ = False  # its name begins like a test's
    kinds, places = (FREE, OTHER, OLD, VOICE), 1

    def __init__(self, rows: int, rng: random.Random) -> None:
        self.rng = rng
        self.known = [_Known() for _ in range(rows)]

    def hear(self, codes: Tensor) -> None:
        for known, row in zip(self.known, codes, strict=True):
            for frame in row.T.tolist():
                known.hear(frame)

    def filler(self, frames: int) -> Tensor:
        """Chat and silence, as there were in the conversation."""
        return collate([known.again(self.rng, frames) for known in self.known]).codes

    def questions(self, ahead: Tensor) -> Iterator[Question]:
        keys = [self.rng.sample(known.asked, len(known.asked)) for known in self.known]
        for place in range(max(map(len, keys))):
            asked = [row[place] if place < len(row) else None for row in keys]
            pairs = zip(self.known, asked, strict=True)
            yield _question((FREE, OTHER, OLD), [self._answers(*pair) for pair in pairs])
        for _ in range(TURNS):
            yield _question((VOICE,), [self._turns(known) for known in self.known])

    def _answers(self, known: _Known, key: int | None) -> Ways:
        """The user asks for a key: the right answer, and in order wrong ones."""
        if key is None:
            return [None] * 4
        now, rng = known.now, self.rng
        never = [value for value in range(v.VALUES) if value not in known.told]
        forgotten = [value for value in known.told if value not in now.values()]
        unknown = rng.choice(never) if never else next(iter(forgotten), None)
        others = [value for value in now.values() if value != now[key]]
        other = rng.choice(others) if others else None
        return [
            None if value is None else known.speaker().exchange(key, value)
            for value in (now[key], unknown, other, known.before.get(key))
        ]

    def _turns(self, known: _Known) -> Ways:
        """Moshi is given the turn: the same words in its voice and in another one."""
        if not any(known.spoken):
            return [None] * 2
        another = self.rng.randrange(1, v.VOICES)
        words = [frame.codes[v.USER] - v.FIRST_WORD for frame in known.filler]
        said = self.rng.choices([word for word in words if word >= 0] or [0], k=2)
        return [known.speaker(away).turn(said) for away in (0, another)]


@dataclass
class _Known:
    """What a listener knows of a conversation of the testbed."""

    now: dict[int, int] = field(default_factory=dict)  # the value of each key
    before: dict[int, int] = field(default_factory=dict)  # and the last other one
    told: dict[int, None] = field(default_factory=dict)  # values, by when they were last told
    filler: deque[Frame] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    spoken: list[int] = field(default_factory=lambda: [0] * v.VOICES)  # frames of Moshi
    heard: list[int] = field(default_factory=lambda: [0] * v.VOICES)  # and of the user
    last: int = v.SILENCE  # what the user said last

    @property
    def asked(self) -> list[int]:
        """Keys that can be asked for: all but one that is just being told anew."""
        return [key for key in self.now if v.FIRST_KEY + key != self.last]

    def hear(self, frame: list[int]) -> None:
        _, says, voice, hears, users_voice = frame
        if v.FIRST_VALUE <= hears < v.FIRST_WORD:
            self._tell(self.last - v.FIRST_KEY, hears - v.FIRST_VALUE)
        elif says == v.SILENCE and (hears == v.SILENCE or hears >= v.FIRST_WORD):
            self.filler.append(Frame((frame[0], says, voice, hears, users_voice)))
        for count, code in ((self.spoken, voice), (self.heard, users_voice)):
            if code < v.QUIET:
                count[code // v.SHADES] += 1
        self.last = hears

    def _tell(self, key: int, value: int) -> None:
        if self.now.get(key, value) != value:
            self.before[key] = self.now[key]
        self.now[key] = value
        self.told.pop(value, None)
        self.told[value] = None

    def again(self, rng: random.Random, frames: int) -> list[Frame]:
        """Filler that was heard, from anywhere on."""
        held = list(self.filler) or self.speaker().silence(1)
        start = rng.randrange(len(held))
        return [held[(start + i) % len(held)] for i in range(frames)]

    def speaker(self, away: int = 0) -> _Speaker:
        """Goes on in the voices that were heard most; Moshi's so many voices away from its own."""
        moshi, user = (count.index(max(count)) for count in (self.spoken, self.heard))
        return _Speaker((moshi + away) % v.VOICES, user)


def _question(kinds: tuple[str, ...], rows: list[Ways]) -> Question:
    """Of each row the right way to go on, and one of each kind, all of one length."""
    frames = next(len(way) for row in rows for way in row if way is not None)
    missing = _Speaker(0, 0).silence(frames)
    columns = list(zip(*rows, strict=True))
    right, *wrong = (collate([way or missing for way in column]).codes for column in columns)
    there = [torch.tensor([way is not None for way in column]) for column in columns[1:]]
    return Question(right, dict(zip(kinds, zip(wrong, there, strict=True), strict=True)))


class _Clear(random.Random):
    """For who always speaks clearly: the least of what may be drawn."""

    def random(self) -> float:
        return 0.0


class _Speaker(Conversation):
    """Says what it is told to, in given voices."""

    def __init__(self, moshi_voice: int, user_voice: int) -> None:
        super().__init__(Level(), _Clear())
        self.moshi_voice, self.user_voice = moshi_voice, user_voice

    def exchange(self, key: int, value: int) -> list[Frame]:
        """The user asks for a key, Moshi says a value."""
        asks = [self._heard(v.ASK), self._heard(v.FIRST_KEY + key)]
        return self._ended([*asks, self._said(v.FIRST_VALUE + value, v.FIRST_VALUE_TEXT + value)])

    def turn(self, words: list[int]) -> list[Frame]:
        """The user gives Moshi the turn, and Moshi says words."""
        says = [self._said(v.FIRST_WORD + word, v.FIRST_WORD_TEXT + word) for word in words]
        return self._ended([self._heard(v.TURN), *says])

    def silence(self, frames: int) -> list[Frame]:
        return [self._heard(v.SILENCE)] * frames

    def _ended(self, frames: list[Frame]) -> list[Frame]:
        return [*frames, *self.silence(max(v.DELAYS))]  # for the last codes to be predicted
