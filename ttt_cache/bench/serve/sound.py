"""What clients say: something like vowels between pauses, made from a seed, coded beforehand.

To code a frame takes a millisecond: done while it is due, it would make clients late.
"""

from __future__ import annotations

import numpy as np

from ttt_cache.serving.codec import CODECS
from ttt_cache.serving.conversation import AUDIO

RATE, FRAME = 24_000, 1920  # samples a second and in a frame, as of every Moshi
SYLLABLE = 6 * FRAME  # half a second, its pause included
HARMONICS = 24


def voice(frames: int, seed: int) -> np.ndarray:
    """Sound that is not silence, float32 `[frames * FRAME]` within [-1, 1]."""
    random = np.random.default_rng(seed)
    syllables = [_syllable(random) for _ in range(-(-frames * FRAME // SYLLABLE))]
    return np.concatenate([*syllables, np.zeros(0, np.float32)])[: frames * FRAME]


def _syllable(random: np.random.Generator) -> np.ndarray:
    """Harmonics of a pitch under two formants, rising and falling, over a little noise."""
    time = np.arange(SYLLABLE) / RATE
    pitch, length = random.uniform(90, 220), random.uniform(0.2, 0.45)
    formants = random.uniform((300, 900), (800, 2400))
    order = np.arange(1, HARMONICS + 1)
    loud = sum(np.exp(-(((order * pitch - each) / 200) ** 2)) for each in formants) + 0.02 / order
    tone = loud @ np.sin(2 * np.pi * pitch * order[:, None] * time)
    swell = np.sin(np.pi * np.clip(time / length, 0, 1)) ** 2
    sound = swell * (tone / np.abs(tone).max() + random.normal(0, 0.05, SYLLABLE))
    return (0.5 * sound + random.normal(0, 0.002, SYLLABLE)).clip(-1, 1).astype(np.float32)


async def messages(codec: str, frames: int, seed: int) -> list[bytes]:
    """A message of Moshi's protocol for each frame of a `voice`, from the stream's head on."""
    coder = CODECS[codec](RATE, FRAME)
    return [AUDIO + await coder.encode(frame) for frame in voice(frames, seed).reshape(-1, FRAME)]
