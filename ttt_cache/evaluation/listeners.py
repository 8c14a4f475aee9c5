"""Models that listen to speech, where the user names one: who speaks, and what is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import sphn
import torch
from torch import Tensor

Embed = Callable[[Tensor, int], Tensor]
"""Samples `[T]` in [-1, 1] and their rate -> an embedding of the speaker, `[E]`."""

Transcribe = Callable[[Tensor, int], str]
"""Samples `[T]` in [-1, 1] and their rate -> what is said."""

RATE = 16_000  # of TorchScript models, which do not tell theirs


def speaker_model(model: str | Path, device: torch.device | str = "cpu") -> Embed:
    """A model of speakers.

    Args:
        model: a TorchScript file that makes of samples `[1, T]` at 16 kHz an embedding `[1, E]`, or
            the name or folder of a transformers model with an x-vector head, such as
            `microsoft/wavlm-base-plus-sv`.

    Raises:
        RuntimeError: transformers is needed and not installed.
    """
    if Path(model).is_file():
        script = torch.jit.load(str(model), map_location=device).eval()
        return lambda wave, rate: _first(script(resampled(wave, rate, RATE)[None].to(device)))
    library = _transformers(f"the speaker model {model}")
    prepare = library.AutoFeatureExtractor.from_pretrained(str(model))
    network = library.AutoModelForAudioXVector.from_pretrained(str(model)).to(device).eval()

    def embed(wave: Tensor, rate: int) -> Tensor:
        wanted = prepare.sampling_rate
        samples = resampled(wave, rate, wanted).numpy()
        given = prepare(samples, sampling_rate=wanted, return_tensors="pt").to(device)
        with torch.no_grad():
            return _first(network(**given).embeddings)

    return embed


def speech_model(model: str | Path, device: torch.device | str = "cpu") -> Transcribe:
    """A model that writes down what is said.

    Args:
        model: the name or folder of a transformers model for automatic speech recognition, such as
            `openai/whisper-small`.

    Raises:
        RuntimeError: transformers is not installed.
    """
    library = _transformers(f"the speech model {model}")
    recogniser = library.pipeline("automatic-speech-recognition", model=str(model), device=device)
    wanted = recogniser.feature_extractor.sampling_rate

    def transcribe(wave: Tensor, rate: int) -> str:
        samples = resampled(wave, rate, wanted).numpy()
        return recogniser({"raw": samples, "sampling_rate": wanted})["text"]

    return transcribe


def resampled(wave: Tensor, rate: int, wanted: int) -> Tensor:
    """Samples `[T]` at another rate, float32 on the CPU."""
    wave = wave.detach().float().cpu()
    if rate == wanted:
        return wave
    samples = sphn.resample(wave.numpy(), rate, wanted)  # and some silence behind them
    return torch.from_numpy(samples)[: len(wave) * wanted // rate]


def _first(embeddings: Tensor) -> Tensor:
    return embeddings.detach().float().cpu()[0]


def _transformers(what: str) -> Any:
    try:
        import transformers  # type: ignore[import-not-found]
    except ImportError:
        raise RuntimeError(
            f"{what} needs the package transformers: pip install transformers"
        ) from None
    return transformers
