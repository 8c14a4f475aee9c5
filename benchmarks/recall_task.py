"""Key-value facts that are stated, stated anew with another value, and asked for, near and far.

A sequence is made of events: a fact, `key value` (2 tokens); a question, `? key` (2 tokens, the
answer is wanted at the key and never shown); a word of filler (1 token). Keys, values and words are
drawn uniformly, so nothing but the key's latest fact tells its value.

A fact comes about every 9 tokens: whoever cannot tell new from old answers with a value of the
past, of which there are, with 16 keys, 3 for each key in 512 tokens and 28 in 4,096. Half of the
questions are drawn among keys whose latest fact is far, if there are any, the others among all that
were stated.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

QUESTION, FIRST_KEY = 0, 1
NONE = -100  # no answer is wanted here: what cross_entropy ignores


class Batch(NamedTuple):
    """Sequences of T tokens.

    Attributes:
        tokens: `[B, T]`, int64.
        answers: the right value, from 0, where a question's key stands; else `NONE`. `[B, T]`.
        age: how many tokens before the question's key the right value stands; else 0. `[B, T]`.
    """

    tokens: Tensor
    answers: Tensor
    age: Tensor

    def asked(self, youngest: int, oldest: int | None = None) -> Tensor:
        """Where an answer of an age from `youngest` to `oldest` is wanted: bool `[B, T]`."""
        young = self.age <= oldest if oldest is not None else True
        return (self.answers != NONE) & (self.age >= youngest) & young


@dataclass(frozen=True)
class Task:
    """Sequences to learn and to be asked from. Tokens: the question mark, keys, values, words.

    Args:
        keys: facts to be held at a time.
        far: how many tokens before the question a fact is far.
    """

    keys: int
    far: int
    values: int = 32
    words: int = 16
    fact: float = 0.15  # share of the events
    ask: float = 0.25  # and of these; the rest is filler

    @property
    def vocabulary(self) -> int:
        return self._first_word + self.words

    def draw(self, rows: int, length: int, rng: random.Random) -> Batch:
        """Random sequences."""
        drawn = [self._sequence(length, rng) for _ in range(rows)]
        return Batch(*(torch.tensor(part) for part in zip(*drawn, strict=True)))

    def exam(self, length: int, questions: int) -> list[Batch]:
        """Sequences that hold at least so many far questions, always the same."""
        rng, batches, asked = random.Random("final exam"), [], 0
        while asked < questions:
            batches.append(self.draw(8, length, rng))
            asked += int(batches[-1].asked(self.far).sum())
        return batches

    @property
    def _first_value(self) -> int:
        return FIRST_KEY + self.keys

    @property
    def _first_word(self) -> int:
        return self._first_value + self.values

    def _sequence(self, length: int, rng: random.Random) -> tuple[list[int], list[int], list[int]]:
        tokens: list[int] = []
        answers, ages = [NONE] * length, [0] * length
        known: dict[int, tuple[int, int]] = {}  # key: its value, and where that stands
        while len(tokens) < length - 1:
            event, here = rng.random(), len(tokens)
            if event < self.fact:
                key, value = rng.randrange(self.keys), rng.randrange(self.values)
                tokens += [FIRST_KEY + key, self._first_value + value]
                known[key] = value, here + 1
            elif event < self.fact + self.ask and known:
                old = [key for key, (_, at) in known.items() if here + 1 - at >= self.far]
                key = rng.choice(old if old and rng.random() < 0.5 else list(known))
                tokens += [QUESTION, FIRST_KEY + key]
                value, at = known[key]
                answers[here + 1], ages[here + 1] = value, here + 1 - at
            else:
                tokens.append(self._first_word + rng.randrange(self.words))
        tokens += [self._first_word] * (length - len(tokens))
        return tokens, answers, ages
