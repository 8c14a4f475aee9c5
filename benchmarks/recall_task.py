"""Key-value facts that are stated, stated anew with another value, and asked for, near and far.

A sequence is made of events: a fact, `key value` (2 tokens); a question, `? key` (2 tokens, the
answer is wanted at the key and never shown); a word of filler (1 token). There are 32 keys, 32
values and 16 words, all drawn uniformly, so nothing but the key's latest fact tells its value, and
a guess is right once in 32. There are twice as many facts to hold as virtual tokens to hold them.

A fact comes about every 9 tokens. In 512 tokens a key is stated 1.7 times, in 4,096 tokens 14
times: whoever cannot tell new from old answers with a value of the past. Half of the questions are
drawn among keys whose latest fact is far, if there are any, the others among all that were stated.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor

KEYS, VALUES, WORDS = 32, 32, 16
FACT, ASK = 0.15, 0.25  # shares of the events; the rest is filler
QUESTION, FIRST_KEY = 0, 1
FIRST_VALUE = FIRST_KEY + KEYS
FIRST_WORD = FIRST_VALUE + VALUES
VOCABULARY = FIRST_WORD + WORDS
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


def draw(rows: int, length: int, far: int, rng: random.Random) -> Batch:
    """Random sequences. `far`: the age from which a fact is far."""
    drawn = [_sequence(length, far, rng) for _ in range(rows)]
    return Batch(*(torch.tensor(part) for part in zip(*drawn, strict=True)))


def exam(length: int, far: int, questions: int) -> list[Batch]:
    """Sequences that hold at least so many far questions, always the same."""
    rng, batches, asked = random.Random("exam"), [], 0
    while asked < questions:
        batches.append(draw(8, length, far, rng))
        asked += int(batches[-1].asked(far).sum())
    return batches


def settings() -> dict[str, float]:
    return {"keys": KEYS, "values": VALUES, "words": WORDS, "fact": FACT, "ask": ASK}


def _sequence(length: int, far: int, rng: random.Random) -> tuple[list[int], list[int], list[int]]:
    tokens: list[int] = []
    answers, ages = [NONE] * length, [0] * length
    known: dict[int, tuple[int, int]] = {}  # key: its value, and where that stands
    while len(tokens) < length - 1:
        event, here = rng.random(), len(tokens)
        if event < FACT:
            key, value = rng.randrange(KEYS), rng.randrange(VALUES)
            tokens += [FIRST_KEY + key, FIRST_VALUE + value]
            known[key] = value, here + 1
        elif event < FACT + ASK and known:
            old = [key for key, (_, place) in known.items() if here + 1 - place >= far]
            key = rng.choice(old if old and rng.random() < 0.5 else list(known))
            tokens += [QUESTION, FIRST_KEY + key]
            value, place = known[key]
            answers[here + 1], ages[here + 1] = value, here + 1 - place
        else:
            tokens.append(FIRST_WORD + rng.randrange(WORDS))
    tokens += [FIRST_WORD] * (length - len(tokens))
    return tokens, answers, ages
