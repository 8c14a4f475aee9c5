"""From words with times to the text stream, one token per frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .facts import LMFacts
from .transcript import MAIN, Word

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor


def text_stream(
    words: Sequence[Word],
    frames: int,
    frame_rate: float,
    tokenizer: SentencePieceProcessor,
    facts: LMFacts,
) -> Tensor:
    """Lay the main speaker's words into frames, as moshi-finetune's `Interleaver` does.

    A word's tokens follow each other from the frame in which it starts, until the next word starts:
    what is left of it then is lost. All other frames hold the padding token, but the frame before
    a word, if it is padding, marks the end of the padding. Words of no duration are left out.

    Args:
        words: of all speakers, by time.
        frames: length of the stream.
        frame_rate: frames per second.

    Returns:
        int32 `[frames]`.
    """
    spoken = [word for word in words if word.speaker == MAIN and word.start < word.end]
    begins = [max(0, math.floor(word.start * frame_rate)) for word in spoken]
    stream = [facts.text_padding] * frames
    for word, (begin, until) in zip(spoken, pairwise([*begins, frames]), strict=True):
        tokens = _tokens(word.text, tokenizer)[: max(0, min(until, frames) - begin)]
        stream[begin : begin + len(tokens)] = tokens
        if tokens and begin > 0 and stream[begin - 1] == facts.text_padding:
            stream[begin - 1] = facts.end_of_text_padding
    return torch.tensor(stream, dtype=torch.int32)


def _tokens(word: str, tokenizer: SentencePieceProcessor) -> list[int]:
    """The tokens of a word; line ends within it are kept, as far as the tokenizer knows them."""
    tokens, *lines = tokenizer.encode(word.strip().split("\n"))
    for line in lines:
        tokens = [*tokens, *tokenizer.encode("\n")[-1:], *line]
    return tokens
