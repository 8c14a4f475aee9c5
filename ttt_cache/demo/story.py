"""What the user says in the demo: facts at first, minutes of talk, and questions at distances."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ttt_cache.testbed import vocabulary as v
from ttt_cache.testbed.stream import NONE, Conversation, Frame, Level, collate

# Its facts are told, asked for and told anew. No pauses, which would make questions late, and no
# turns for Moshi to speak: the user cannot know when it ends.
TALK = Level(keys=8, speech=0, pause=0)
HELD = v.KEYS - TALK.keys  # further facts, told at first and asked for once
LATE = 8  # frames that a question may wait for what is being said, and last
LEAST = 256  # frames of a story


@dataclass(frozen=True)
class Question:
    """The first question about a fact that was told, and the answer that is right.

    Not the next ones: what Moshi said then, right or wrong, would be asked for.

    Attributes:
        row: which conversation.
        frame: in which Moshi should answer.
        key: number of what was asked for.
        answer: the right text token.
        age: frames since that was told.
    """

    row: int
    frame: int
    key: int
    answer: int
    age: int

    @property
    def fact(self) -> str:
        """What was asked for."""
        return v.FACTS[self.key]

    @property
    def held(self) -> bool:
        """Told at first, and not spoken of since."""
        return self.key >= TALK.keys


@dataclass(frozen=True)
class Story:
    """Conversations of equal length.

    Attributes:
        heard: the user's codes, int64 `[B, 2, T]`.
        questions: by row and frame.
    """

    heard: Tensor
    questions: list[Question]


def write_story(rows: int, frames: int, seed: int) -> Story:
    """Conversations of `frames` frames, at least `LEAST`, with facts of their own."""
    rng = random.Random(f"demo {seed}")
    talks = [_Planned(frames, rng).take(frames) for _ in range(rows)]
    questions = [each for row, talk in enumerate(talks) for each in _questions(row, talk)]
    return Story(collate(talks).codes[:, v.USER :].contiguous(), questions)


class _Planned(Conversation):
    """Tells the held facts at first, and asks for one at each of `HELD` equal distances."""

    def __init__(self, frames: int, rng: random.Random) -> None:
        super().__init__(TALK, rng)
        keys = rng.sample(range(TALK.keys, v.KEYS), HELD)
        plan = [(0, partial(self._tell, key)) for key in sorted(keys)]
        for number, key in enumerate(keys, start=1):
            plan.append(((frames - LATE) * number // HELD, partial(self._ask, key)))
        self._plan = deque(plan)

    def _event(self) -> Iterator[Frame]:
        if self._plan and self._at >= self._plan[0][0]:
            return self._plan.popleft()[1]()
        return super()._event()


def _questions(row: int, talk: list[Frame]) -> Iterator[Question]:
    for number, frame in enumerate(talk):
        if frame.answer != NONE:
            key = talk[number - 1].codes[v.USER] - v.FIRST_KEY
            told = talk[number - frame.age].codes[v.USER] != v.SILENCE
            if told:
                yield Question(row, number, key, frame.answer, frame.age)
