"""Mel-cepstral distortion: how far the sound of one recording is from that of another.

Kubichek, "Mel-cepstral distance measure for objective speech quality assessment", IEEE PACRIM
1993: `10 sqrt(2) / ln 10 * sqrt(sum over m = 1 .. 13 of (c_m - c'_m)^2)`, averaged over frames.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

COEFFICIENTS = 13  # beside the 0th, which is loudness and does not count
BANDS = 80
WINDOW, HOP = 0.025, 0.010  # seconds
QUIET = 1e-5  # of full scale: the amplitude below which all is silence
DECIBELS = 10 * math.sqrt(2) / math.log(10)


def mcd(first: Tensor, second: Tensor, rate: int) -> float:
    """Mel-cepstral distortion of two recordings of the same words, in dB.

    Frames are put beside each other by dynamic time warping, since nobody says anything twice at
    the same speed; the mean is over the pairs of the warping path.

    Args:
        first, second: samples in [-1, 1], floating point `[T]` each.
        rate: of both, samples a second.

    Raises:
        ValueError: as `mel_cepstra`.
    """
    sides = [mel_cepstra(wave, rate)[:, 1:].numpy() for wave in (first, second)]
    return DECIBELS * warped_distance(*sides)


def mel_cepstra(wave: Tensor, rate: int) -> Tensor:
    """Cepstra of the log amplitudes of mel bands, float64 `[frames, 1 + COEFFICIENTS]`.

    `log amplitude of band k = c_0 + sum over m of c_m cos(pi m (k + 1/2) / BANDS)`, the scale on
    which Kubichek's formula is the distance of smoothed spectra in dB.

    Args:
        wave: samples in [-1, 1], floating point `[T]`.
        rate: samples a second.

    Raises:
        ValueError: the wave has another shape, or is shorter than one window of 25 ms.
    """
    size = round(WINDOW * rate)
    if wave.dim() != 1 or len(wave) < size:
        wanted = f"[T] with T of at least {size}, {WINDOW * 1e3:g} ms"
        raise ValueError(f"wave must have shape {wanted}, got {list(wave.shape)}")
    window = torch.hann_window(size, dtype=torch.float64)
    frames = wave.detach().cpu().double().unfold(0, size, round(HOP * rate))
    spectrum = torch.fft.rfft(frames * window / window.sum(), n=2 ** math.ceil(math.log2(size)))
    bands = spectrum.abs() @ _mel_filters(spectrum.shape[-1], rate).T
    return bands.clamp_min(QUIET).log() @ _cosines().T


def _mel_filters(bins: int, rate: int) -> Tensor:
    """Triangles of equal width on the mel scale, each a weighted mean: `[BANDS, bins]`."""
    frequencies = torch.linspace(0, rate / 2, bins, dtype=torch.float64)
    mels = 2595 * torch.log10(1 + frequencies / 700)
    edges = torch.linspace(0, float(mels[-1]), BANDS + 2, dtype=torch.float64)
    rising = (mels - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - mels) / (edges[2:] - edges[1:-1])[:, None]
    weights = torch.minimum(rising, falling).clamp_min(0)
    # A low band may lie between two bins: it takes the nearest one.
    nearest = (mels - edges[1:-1, None]).abs().argmin(1)
    empty = weights.sum(1) == 0
    weights[empty, nearest[empty]] = 1
    return weights / weights.sum(1, keepdim=True)


def _cosines() -> Tensor:
    """From log amplitudes of bands to cepstra, `[1 + COEFFICIENTS, BANDS]`."""
    place = (torch.arange(BANDS, dtype=torch.float64) + 0.5) / BANDS
    order = torch.arange(1 + COEFFICIENTS, dtype=torch.float64)
    cosines = 2 / BANDS * torch.cos(math.pi * order[:, None] * place)
    cosines[0] /= 2
    return cosines


def warped_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Mean Euclidean distance along the path of dynamic time warping.

    The path goes from the first pair of frames to the last one frame at a time, on either side or
    on both, such that the sum over its pairs is the smallest (Sakoe and Chiba, "Dynamic programming
    algorithm optimization for spoken word recognition", 1978, unweighted).

    Args:
        first, second: `[T1, D]` and `[T2, D]`.
    """
    rows, columns = len(first), len(second)
    infinite, none = np.full(rows + 1, np.inf), np.zeros(rows + 1, dtype=np.int64)
    # Diagonal by diagonal (i + j = k); place i + 1 is row i. Before each: itself, its length.
    older = before = (infinite, none)
    for k in range(rows + columns - 1):
        i = np.arange(max(0, k - columns + 1), min(k, rows - 1) + 1)
        distance = np.linalg.norm(first[i] - second[k - i], axis=1)
        ways = [(older, i), (before, i), (before, i + 1)]  # both sides, the first, the second
        totals = np.stack([sums[place] for (sums, _), place in ways])
        steps = np.stack([lengths[place] for (_, lengths), place in ways])
        best = totals.argmin(0)
        chosen = np.arange(len(i))
        total, length = totals[best, chosen], steps[best, chosen]
        now = infinite.copy(), none.copy()
        now[0][i + 1] = distance + (0 if k == 0 else total)
        now[1][i + 1] = length + 1
        older, before = before, now
    return float(before[0][rows] / before[1][rows])
