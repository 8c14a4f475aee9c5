"""Recordings of any length through Mimi: pieces are the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data_support import FRAME, noise, tiny_mimi
from moshi.models.loaders import get_mimi

from ttt_cache.training.data.codec import encode, fingerprint, history


def reader(sound: np.ndarray):
    return lambda start, count: sound[:, start : start + count]


def speech(samples: int, channels: int = 2) -> np.ndarray:
    return (noise(samples, channels).T / 32768).astype(np.float32)


@pytest.mark.parametrize("piece", [1, 3, 7])
@pytest.mark.parametrize("samples", [20 * FRAME, 20 * FRAME - 700, 5 * FRAME + 1, 900])
def test_pieces_give_the_codes_of_the_whole(piece: int, samples: int) -> None:
    mimi, sound = tiny_mimi(), speech(samples)
    mimi.set_num_codebooks(4)
    frames = -(-samples // FRAME)
    with torch.no_grad():
        whole = mimi.encode(torch.from_numpy(sound)[:, None])
    codes = encode(mimi, reader(sound), samples, piece)
    assert codes.dtype == torch.int32 and codes.shape == (8, frames)
    assert torch.equal(codes, whole.flatten(0, 1).int())
    if frames > 4:
        assert all(len(row.unique()) > 2 for row in codes), "codes that say something"


def test_history_is_what_codes_depend_on() -> None:
    """Change the sound just outside of the history, then just inside."""
    mimi, back, last = tiny_mimi(), history(tiny_mimi()), 30
    assert back is not None and 6 < back < 20
    sound = torch.from_numpy(speech((last + 1) * FRAME, 1))[None]

    def latent(changed: slice) -> torch.Tensor:
        other = sound.clone()
        other[:, :, changed] = 1.0
        with torch.no_grad():
            return mimi.encode_to_latent(other, quantize=False)[:, :, last]

    stock = latent(slice(0, 0))
    assert torch.equal(latent(slice(0, (last - back) * FRAME)), stock)
    assert not torch.equal(latent(slice(0, (last - back + 2) * FRAME)), stock)


def test_history_of_the_released_mimi() -> None:
    # 8 layers of 250 positions at 25 Hz see 996 frames of 80 ms; the convolutions add 4.
    assert history(get_mimi(None, device="meta")) == 1000


def test_a_mimi_without_limit_takes_recordings_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    mimi = tiny_mimi()
    assert mimi.encoder_transformer is not None
    for module in mimi.encoder_transformer.modules():
        if hasattr(module, "context"):
            monkeypatch.setattr(module, "context", None)
    assert history(mimi) is None
    sound, asked = speech(9 * FRAME), []
    encode(mimi, lambda *part: asked.append(part) or sound, 9 * FRAME, piece=2)
    assert asked == [(0, 9 * FRAME)]


def test_memory_is_bounded_by_the_piece() -> None:
    """No call asks for more sound than a piece and its history."""
    mimi, sound, asked = tiny_mimi(), speech(60 * FRAME), []

    def read(start: int, count: int) -> np.ndarray:
        asked.append(count)
        return sound[:, start : start + count]

    encode(mimi, read, 60 * FRAME, piece=4)
    assert max(asked) <= (4 + (history(mimi) or 0)) * FRAME


def test_fingerprints_follow_the_weights() -> None:
    assert fingerprint(tiny_mimi()) == fingerprint(tiny_mimi.__wrapped__())
    assert fingerprint(tiny_mimi()) != fingerprint(tiny_mimi(seed=1))
