"""Small data sets in moshi-finetune's format, and codecs of the real classes to tokenise them."""

from __future__ import annotations

import functools
import io
import json
import runpy
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from models import tiny_lm
from moshi.models.compression import MimiModel
from moshi.models.loaders import _mimi_config, get_mimi

from ttt_cache.training.data import LMFacts

MAKE_SMALL = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "make_small.py"))
RATE = 24_000
FRAME = 1920

# Two codebooks of 30 codes per channel, as many as models.TINY has; a vocabulary of at most 40.
FACTS = LMFacts.of(tiny_lm())
SENTENCES = ["hello how are you", "i am fine thank you", "and how was your day my friend"]


@functools.cache
def tiny_mimi(context: int = 6, seed: int = 0) -> MimiModel:
    """The real MimiModel, narrow: same rates, strides and kernels, 2 layers of attention."""
    torch.manual_seed(seed)
    config = {
        **_mimi_config,
        "seanet": {**_mimi_config["seanet"], "dimension": 16, "n_filters": 2},
        "quantizer": {
            "dimension": 8,
            "n_q": 4,
            "bins": 30,
            "input_dimension": 16,
            "output_dimension": 16,
        },
        "transformer": {
            **_mimi_config["transformer"],
            "d_model": 16,
            "num_heads": 2,
            "num_layers": 2,
            "context": context,
            "dim_feedforward": 32,
            "layer_scale": 1.0,  # so that attention matters for the codes
            "input_dimension": 16,
            "output_dimensions": [16],
        },
    }
    mimi = get_mimi(None, mimi_config=config, num_codebooks=4)
    MAKE_SMALL["fill_codebooks"](mimi, torch.randn(1, 1, 40 * FRAME) * 0.3)
    return mimi


@functools.cache
def tiny_tokenizer(vocab_size: int = 30) -> sentencepiece.SentencePieceProcessor:
    """A sentencepiece model of a few sentences, with the padding piece where Moshi's has it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=model,
        vocab_size=vocab_size,
        pad_id=3,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def noise(samples: int, channels: int = 2, seed: int = 0) -> np.ndarray:
    """int16 `[samples, channels]`."""
    values = np.random.default_rng(seed).normal(0, 3000, (samples, channels))
    return values.astype(np.int16)


def write_wav(path: Path, samples: np.ndarray, rate: int = RATE) -> None:
    """A 16-bit WAV file of `[samples, channels]`."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())


def write_transcript(path: Path, seconds: float, step: float = 0.5) -> None:
    """A word of the main speaker every half second, the user's words in between."""
    words = " ".join(SENTENCES).split()
    starts = np.arange(0, max(seconds - 0.2, 0), step).tolist()
    alignments: list[Any] = []
    for number, start in enumerate(starts):
        alignments.append([words[number % len(words)], [start, start + 0.2], "SPEAKER_MAIN"])
        alignments.append(["mm", [start + 0.1, start + 0.2], "SPEAKER_OTHER"])
    path.write_text(json.dumps({"alignments": alignments}))


def write_data_set(
    folder: Path, lengths: Sequence[int], channels: int = 2, rate: int = RATE
) -> Path:
    """Recordings of `lengths` samples with their transcripts; returns the manifest."""
    (folder / "wavs").mkdir(parents=True)
    lines = []
    for number, samples in enumerate(lengths):
        path = folder / "wavs" / f"{number}.wav"
        write_wav(path, noise(samples, channels, seed=number), rate)
        write_transcript(path.with_suffix(".json"), samples / rate)
        lines.append(json.dumps({"path": f"wavs/{number}.wav", "duration": samples / rate}))
    manifest = folder / "data.jsonl"
    manifest.write_text("\n".join(lines) + "\n")
    return manifest


def rewrite_line(manifest: Path, number: int, **changes: Any) -> None:
    """Change fields of one line (from 0) of a manifest; `None` removes a field."""
    lines = manifest.read_text().splitlines()
    fields = {**json.loads(lines[number]), **changes}
    lines[number] = json.dumps({key: value for key, value in fields.items() if value is not None})
    manifest.write_text("\n".join(lines) + "\n")


class TensorSessions:
    """Sessions that are in memory already."""

    def __init__(self, codes: Sequence[torch.Tensor]) -> None:
        self.tensors = list(codes)
        self.frames = [each.shape[1] for each in codes]

    def codes(self, session: int) -> torch.Tensor:
        return self.tensors[session]


def random_sessions(lengths: Sequence[int], seed: int = 0) -> TensorSessions:
    """Sessions of random codes for `models.TINY`."""
    generator = torch.Generator().manual_seed(seed)
    shape = FACTS.codebooks
    return TensorSessions(
        [torch.randint(0, FACTS.card, (shape, length), generator=generator) for length in lengths]
    )
