"""Conversations with long-range structure, generated for as long as anyone listens.

A user tells facts (`key value`) and asks for them later (`? key`); Moshi answers in the next frame,
in text and voice, with the latest value of that key. Between these, the user chats, both are
silent, or the user gives Moshi the turn to speak. Who speaks keeps one voice for ever: the second
codebook tells it, and after a long pause nothing in the window does.

Words follow each other as in a language: each has a few likely successors (a Markov chain). Keys,
values and voices are drawn uniformly, so that nothing but the past tells them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from . import vocabulary as v

NONE = -100  # no answer is wanted here: what cross_entropy ignores
SUCCESSORS = (0.5, 0.25, 0.15, 0.1)  # how likely the words that may follow a word are
CLEAR = 0.85  # share of acoustic codes that tell the voice


@dataclass(frozen=True)
class Level:
    """How hard a conversation is. Weights say how often an event comes, beside the others.

    Args:
        keys: facts that are told, 1 to 16.
        overwrite: tell a key again with another value; else each has one value for ever.
        pauses: length in frames of long pauses, shortest and longest.
        dialect: 0 or 1: which words follow which.
    """

    keys: int = v.KEYS
    overwrite: bool = True
    fact: float = 0.26
    ask: float = 0.32
    chat: float = 0.16
    silence: float = 0.15
    speech: float = 0.10
    pause: float = 0.01
    pauses: tuple[int, int] = (40, 120)
    dialect: int = 0


LEVELS = {
    "few": Level(keys=4, overwrite=False),
    "many": Level(overwrite=False),
    "rewritten": Level(),
    "distant": Level(fact=0.14, ask=0.20, chat=0.30, silence=0.21, speech=0.11, pause=0.04),
    "dialect": Level(dialect=1),
    "paused": Level(fact=0.3, pause=0.015, pauses=(400, 850)),  # facts as old as the context
    "held": Level(pauses=(900, 1400)),  # what was said before a pause has left Moshi's own ring
}
LEARNED = "few", "many", "rewritten", "distant", "dialect", "paused"  # what the model was taught


class Frame(NamedTuple):
    """One frame of both sides, not delayed, and what is asked of Moshi in it.

    Attributes:
        codes: text, Moshi's two codebooks, the user's two.
        answer: the text token that is right where Moshi answers, else `NONE`.
        age: frames since the answer was last told or said; where Moshi begins to speak in its
            voice again, frames since it last did. 0 elsewhere.
        load: facts known.
        rewritten: values that the asked key had before.
    """

    codes: tuple[int, int, int, int, int]
    answer: int = NONE
    age: int = 0
    load: int = 0
    rewritten: int = 0


class Batch(NamedTuple):
    """B conversations of T frames, all int64; `codes` `[B, 5, T]`, the others as in `Frame`."""

    codes: Tensor
    answer: Tensor
    age: Tensor
    load: Tensor
    rewritten: Tensor


@dataclass
class _Fact:
    value: int
    seen: int  # frame in which it was last told or said
    rewritten: int = 0


@dataclass
class Conversation:
    """An endless conversation; `take` goes on where the last call stopped."""

    level: Level
    rng: random.Random
    facts: dict[int, _Fact] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.moshi_voice = self.rng.randrange(v.VOICES)
        self.user_voice = self.rng.randrange(v.VOICES)
        self._word = self.rng.randrange(v.WORDS)
        self._spoke = 0  # frame in which Moshi last spoke
        self._at = 0
        level = self.level
        self._kinds = {
            self._fact: level.fact,
            self._question: level.ask,
            self._chat: level.chat,
            self._silence: level.silence,
            self._speech: level.speech,
            self._pause: level.pause,
        }
        self._frames = self._events()

    def take(self, frames: int) -> list[Frame]:
        taken = []
        for frame in self._frames:
            taken.append(frame)
            if len(taken) == frames:
                break
        return taken

    def _events(self) -> Iterator[Frame]:
        while True:
            for frame in self._event():
                yield frame
                self._at += 1

    def _event(self) -> Iterator[Frame]:
        """What happens next."""
        (event,) = self.rng.choices(list(self._kinds), list(self._kinds.values()))
        return event()

    def _fact(self) -> Iterator[Frame]:
        yield from self._tell(self.rng.randrange(self.level.keys))

    def _tell(self, key: int) -> Iterator[Frame]:
        known = self.facts.get(key)
        if known is None:
            known = self.facts[key] = _Fact(self.rng.randrange(v.VALUES), 0)
        elif self.level.overwrite:
            known.value = self.rng.randrange(v.VALUES)
            known.rewritten += 1
        yield self._heard(v.FIRST_KEY + key)
        known.seen = self._at
        yield self._heard(v.FIRST_VALUE + known.value)

    def _question(self) -> Iterator[Frame]:
        # Keys beyond the level's own are for those who plan a conversation.
        known = [key for key in self.facts if key < self.level.keys]
        if not known:
            return
        by_age = sorted(known, key=lambda key: self.facts[key].seen)
        oldest = by_age[: max(1, len(by_age) // 4)]
        yield from self._ask(self.rng.choice(oldest if self.rng.random() < 0.5 else by_age))

    def _ask(self, key: int) -> Iterator[Frame]:
        fact = self.facts[key]
        yield self._heard(v.ASK)
        yield self._heard(v.FIRST_KEY + key)
        age, fact.seen = self._at - fact.seen, self._at
        said = self._said(v.FIRST_VALUE + fact.value, v.FIRST_VALUE_TEXT + fact.value)
        yield said._replace(
            answer=said.codes[v.TEXT], age=age, load=len(self.facts), rewritten=fact.rewritten
        )

    def _chat(self) -> Iterator[Frame]:
        for _ in range(self.rng.randint(1, 4)):
            yield self._heard(v.FIRST_WORD + self._next_word())

    def _silence(self) -> Iterator[Frame]:
        for _ in range(self.rng.randint(1, 3)):
            yield self._heard(v.SILENCE)

    def _pause(self) -> Iterator[Frame]:
        end = self._at + self.rng.randint(*self.level.pauses)
        while self._at < end:
            yield from self._chat() if self.rng.random() < 0.5 else self._silence()

    def _speech(self) -> Iterator[Frame]:
        yield self._heard(v.TURN)
        for index in range(self.rng.randint(2, 5)):
            word, away = self._next_word(), self._at - self._spoke
            said = self._said(v.FIRST_WORD + word, v.FIRST_WORD_TEXT + word)
            yield said._replace(age=0 if index else away)
            for _ in range(self.rng.randint(0, 1)):
                yield self._said(v.FIRST_WORD + word, v.PADDING)

    def _heard(self, semantic: int) -> Frame:
        quiet = v.PADDING, v.SILENCE, v.QUIET
        return Frame((*quiet, semantic, self._acoustic(semantic, self.user_voice)))

    def _said(self, semantic: int, text: int) -> Frame:
        self._spoke = self._at
        voice = self._acoustic(semantic, self.moshi_voice)
        return Frame((text, semantic, voice, v.SILENCE, v.QUIET))

    def _acoustic(self, semantic: int, voice: int) -> int:
        if semantic == v.SILENCE:
            return v.QUIET
        if v.FIRST_KEY <= semantic < v.FIRST_VALUE:
            return v.FIRST_SPELLED + semantic - v.FIRST_KEY
        if self.rng.random() < CLEAR:
            return voice * v.SHADES + v.shade(semantic)
        return self.rng.randrange(v.QUIET)

    def _next_word(self) -> int:
        (likely,) = self.rng.choices(range(len(SUCCESSORS)), SUCCESSORS)
        self._word = _SUCCESSORS[self.level.dialect][self._word][likely]
        return self._word


def _successors(dialect: int) -> list[list[int]]:
    rng = random.Random(f"dialect {dialect}")
    return [rng.sample(range(v.WORDS), len(SUCCESSORS)) for _ in range(v.WORDS)]


_SUCCESSORS = [_successors(0), _successors(1)]


def collate(rows: list[list[Frame]]) -> Batch:
    """Rows of equally many frames as tensors."""
    codes = torch.tensor([[frame.codes for frame in row] for row in rows]).transpose(1, 2)
    rest = torch.tensor([[frame[1:] for frame in row] for row in rows]).unbind(-1)
    return Batch(codes.contiguous(), *rest)


def draw(rows: int, frames: int, levels: list[Level], rng: random.Random) -> Batch:
    """Fresh conversations, each of a level drawn from `levels`."""
    talks = [Conversation(rng.choice(levels), rng) for _ in range(rows)]
    return collate([talk.take(frames) for talk in talks])
