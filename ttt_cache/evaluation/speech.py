"""What can be heard of a long conversation: sound, voice and words, by models the user gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from moshi.models.compression import MimiModel
from moshi.models.lm import LMModel
from moshi.utils.compile import no_compile
from torch import Tensor

from ttt_cache.checks import whole_number

from .cepstra import mcd
from .forced import forced
from .generation import generate
from .habits import spoken
from .listeners import Embed, Transcribe
from .pieces import peeked, regrouped
from .words import wer, words

if TYPE_CHECKING:
    from .source import Conversations, Piece

SEGMENT = 750  # frames that are listened to together: a minute
EXCERPT = 125  # frames that are warped onto each other: 10 seconds


class Tokenizer(Protocol):
    """Of the text; sentencepiece's processor is one."""

    def decode(self, ids: list[int]) -> str: ...


def speech(
    lm: LMModel,
    mimi: MimiModel,
    source: Conversations,
    frames: int,
    seed: int = 0,
    *,
    tokenizer: Tokenizer,
    embed: Embed | None = None,
    transcribe: Transcribe | None = None,
    segment: int = SEGMENT,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Let a model answer a user, and listen: does it keep its voice, and say what it means to say?

    Args:
        lm, source, frames, seed, settings: as for `freerun`.
        mimi: the codec, with as many codebooks as `lm` speaks.
        tokenizer: of the text.
        embed: of speakers, see `listeners.speaker_model`.
        transcribe: see `listeners.speech_model`.
        segment: frames that are listened to at a time; one that is not full is left out.

    Returns:
        JSON-able: `segments`, each with `start`, `text` (what Moshi means to say, its text stream),
        `heard` (what `transcribe` hears), and `similarity` of its voice to that of the first
        segment in which it speaks (cosine of the embeddings, `None` for that one and where it says
        nothing); over all `similarity` (mean) and `wer` (see `words.wer`), or `None`.

    Raises:
        TypeError, ValueError, RuntimeError: as `freerun`; neither model is given.
    """
    whole_number("frames", frames, 1)
    whole_number("segment", segment, 1)
    if embed is None and transcribe is None:
        raise ValueError("speech needs embed or transcribe, a model that listens; got neither")
    heard = (piece.codes[:, 1 + lm.dep_q :] for piece in source.pieces(1, frames, seed))
    segments, first = [], None
    with closing(generate(lm, heard, 1, seed, settings)) as pieces, decoding(mimi, 1) as decode:
        for start, codes in regrouped((piece.codes for piece in pieces), segment):
            wave = decode(codes[:, 1:])[0]
            text = codes[0, 0]
            said = tokenizer.decode(text[torch.from_numpy(spoken(lm, text.numpy()))].tolist())
            entry: dict[str, Any] = {"start": start, "text": said, "similarity": None}
            if embed is not None and words(said):
                voice = embed(wave, mimi.sample_rate)
                if first is None:
                    first = voice
                else:
                    entry["similarity"] = similarity(first, voice)
            entry["heard"] = transcribe(wave, mimi.sample_rate) if transcribe else None
            segments.append(entry)
    return {"segments": segments, **_over_all(segments)}


def distortion(
    lm: LMModel, mimi: MimiModel, pieces: Iterable[Piece], segment: int = EXCERPT
) -> dict[str, Any]:
    """Mel-cepstral distortion of what a model would say next, frame by frame, from what was said.

    Teacher-forced: the model's most likely codes of every frame, and the recorded ones, are both
    decoded; so the codec itself makes no difference.

    Args:
        lm: as for `forced`.
        mimi: the codec, with as many codebooks as `lm` speaks.
        pieces: consecutive pieces of conversations.
        segment: frames that are warped onto each other at a time; those that are not full, or in
            which a code is missing, are left out.

    Returns:
        JSON-able: `segments` with `start` and `mcd`, in dB, of each row; `mcd`, the mean.
    """
    rows, pieces = peeked(pieces)
    segments = []
    said = slice(1, 1 + lm.dep_q)
    both = (
        torch.cat([scores.choices[:, said], piece.codes[:, said]], dim=1)
        for scores, piece in forced(lm, pieces, rows)
    )
    with decoding(mimi, 2 * rows) as decode:
        for start, codes in regrouped(both, segment):
            chosen, recorded = decode(torch.cat(codes.clamp_min(0).chunk(2, dim=1))).chunk(2)
            whole = (codes >= 0).flatten(1).all(1)
            found = [
                mcd(one, other, mimi.sample_rate) if there else None
                for one, other, there in zip(chosen, recorded, whole, strict=True)
            ]
            segments.append({"start": start, "mcd": found})
    known = [value for entry in segments for value in entry["mcd"] if value is not None]
    return {"segments": segments, "mcd": sum(known) / len(known) if known else None}


def similarity(first: Tensor, second: Tensor) -> float:
    """Cosine of two embeddings `[E]`."""
    return float(F.cosine_similarity(first.double(), second.double(), dim=0))


@contextmanager
def decoding(mimi: MimiModel, rows: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yields a function from the next codes `[B, K, S]` to their samples, float32 `[B, T]`."""

    def decode(codes: Tensor) -> Tensor:
        device = next(mimi.parameters()).device
        # Frame by frame: in longer pieces Moshi's ring forgets keys that it still needs.
        with torch.no_grad(), no_compile():
            waves = [mimi.decode(frame) for frame in codes.to(device).split(1, dim=2)]
        return torch.cat(waves, dim=2)[:, 0].float().cpu()

    with mimi.streaming(rows):
        yield decode


def _over_all(segments: list[dict[str, Any]]) -> dict[str, float | None]:
    known = [entry["similarity"] for entry in segments if entry["similarity"] is not None]
    pairs = [(entry["text"], entry["heard"]) for entry in segments if words(entry["text"])]
    listened = [pair for pair in pairs if pair[1] is not None]
    return {
        "similarity": sum(known) / len(known) if known else None,
        "wer": wer(*zip(*listened, strict=True)) if listened else None,
    }
