"""From a sound file to the codes that Moshi hears.

The clip in the package, `data/speech.wav`, was made with espeak-ng 1.51 and sox 14.4.2:

    espeak-ng -v en-us -s 165 -w a.wav "Hello. I am a short clip of synthetic speech. \
Every eighty milliseconds of me becomes one frame, and what leaves the window is folded \
into a small memory."
    sox -D a.wav -r 24000 -c 1 -b 16 speech.wav
"""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import sphn
import torch
from moshi.models.loaders import FRAME_RATE, SAMPLE_RATE, get_mimi
from moshi.quantization.core_vq import VectorQuantization
from moshi.quantization.vq import ResidualVectorQuantizer, SplitResidualVectorQuantizer
from moshi.utils.compile import no_compile
from torch import Tensor

FRAME = int(SAMPLE_RATE / FRAME_RATE)  # samples in a frame of 80 ms
LONGEST = 30.0  # seconds; Mimi takes the clip in one piece, about 20 MB of memory per second
RATES = (1_000, 768_000)  # Hz; sphn takes the process down over the rates of a broken header


def read_clip(path: Path | None = None) -> Tensor:
    """Read a sound file as one channel at 24 kHz, cut to whole frames and to 30 s.

    Args:
        path: any rate and number of channels; `None` is the clip in the package.

    Returns:
        Samples, float32 [1, 1, T], T a multiple of 1920.

    Raises:
        ValueError: the file cannot be read, is not a sound file, is shorter than a frame, or has
            samples that are not finite.
    """
    if path is None:
        with as_file(files("ttt_cache") / "data" / "speech.wav") as shipped:
            return read_clip(shipped)
    try:
        with path.open("rb"):
            pass  # sphn's own message does not tell a missing file from a broken one
    except OSError as error:
        raise ValueError(f"WAV must be a file to read, got {path}: {error.strerror}") from error
    samples = _samples(path)
    clip = torch.from_numpy(samples).float().mean(dim=0)[: int(LONGEST * SAMPLE_RATE)]
    if len(clip) < FRAME:
        raise ValueError(
            f"WAV must last 0.08 s (one frame) or longer, got {len(clip) / SAMPLE_RATE:.3f} s "
            f"in {path}"
        )
    if not clip.isfinite().all():
        raise ValueError(f"WAV must hold finite samples, got NaN or infinity in {path}")
    return clip[None, None, : len(clip) // FRAME * FRAME]


def _samples(path: Path) -> np.ndarray:
    """The first seconds of a sound file at 24 kHz, [channels, T]."""
    try:
        rate = sphn.FileReader(str(path)).sample_rate
        if RATES[0] <= rate <= RATES[1]:
            return sphn.read(str(path), duration_sec=LONGEST, sample_rate=SAMPLE_RATE)[0]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in sphn is not an Exception
        raise ValueError(f"WAV must be a sound file, got {path}, which is not one") from error
    raise ValueError(f"WAV must have a rate of {RATES[0]} to {RATES[1]} Hz, got {rate} in {path}")


@torch.no_grad()
def encode(clip: Tensor, seed: int, device: str) -> Tensor:
    """Put a clip through Mimi at its full size, with random weights.

    Args:
        clip: samples [1, 1, T].

    Returns:
        Codes, int64 [1, 8, T / 1920], each in 0 .. 2047.
    """
    torch.manual_seed(seed)
    with no_compile():
        mimi = get_mimi(None, device=device, num_codebooks=8)
        latent = mimi.encode_to_latent(clip.to(device), quantize=False)
        quantizer = mimi.quantizer
        assert isinstance(quantizer, SplitResidualVectorQuantizer)
        for part in (quantizer.rvq_first, quantizer.rvq_rest):
            _fill_codebooks(part, latent)
        return quantizer.encode(latent)


def _fill_codebooks(quantizer: ResidualVectorQuantizer, latent: Tensor) -> None:
    """Spread random code words where the clip's frames are.

    Moshi leaves the codebooks of an untrained Mimi at zero, which would make every code 0.
    """
    residual = quantizer.input_proj(latent)  # [1, D, T]
    for layer in list(quantizer.vq.layers)[: quantizer.n_q]:
        assert isinstance(layer, VectorQuantization)
        codebook = layer._codebook
        centre, spread = residual.mean(dim=(0, 2)), residual.std(dim=(0, 2), correction=0)
        words = centre + spread * torch.randn_like(codebook.embedding_sum)  # [card, D]
        codebook.embedding_sum.copy_(words)  # cluster_usage is 1, so the sum is the word
        residual = residual - layer.decode(layer.encode(residual))
