"""What is heard: distortion, voices and words, beside formulas and slow searches."""

from __future__ import annotations

import functools
import json
import math
import random
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from data_support import FRAME, tiny_mimi
from models import SMALL, random_codes, tiny_lm

import ttt_cache
from ttt_cache.evaluation import cepstra
from ttt_cache.evaluation.cepstra import BANDS, DECIBELS, mcd, mel_cepstra, warped_distance
from ttt_cache.evaluation.listeners import speaker_model, speech_model
from ttt_cache.evaluation.pieces import regrouped
from ttt_cache.evaluation.source import Piece
from ttt_cache.evaluation.speech import decoding, distortion, similarity, speech
from ttt_cache.evaluation.words import edits, wer, words

RATE = 24_000


def noise(samples, seed=0):
    return 0.3 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def speechlike(samples, seed=0):
    """Noise that is loud and quiet by turns and whose colour changes."""
    wave, time = noise(samples, seed), torch.arange(samples) / RATE
    tones = torch.sin(2 * math.pi * (300 + 2000 * torch.sin(3 * time)) * time)
    return (wave * torch.sin(5 * time) ** 2 + 0.3 * tones).clamp(-1, 1)


def test_a_recording_beside_itself():
    wave = speechlike(RATE)
    assert mcd(wave, wave, RATE) == 0
    assert mcd(wave, noise(RATE), RATE) > 3


def test_loudness_does_not_count():
    assert mcd(noise(RATE), 0.5 * noise(RATE), RATE) == pytest.approx(0, abs=1e-6)


def test_the_constant_is_kubicheks():
    assert pytest.approx(10 / math.log(10) * math.sqrt(2)) == DECIBELS
    assert pytest.approx(6.1418, abs=1e-4) == DECIBELS


def test_the_formula_by_hand(monkeypatch):
    """Frames whose cepstra differ by known amounts; the 0th does not count."""
    one, other = torch.zeros(2, 40, 14, dtype=torch.float64)
    other[:, 0], other[:, 3], other[:, 7] = 5.0, 0.3, -0.4
    both = iter([one, other])
    monkeypatch.setattr(cepstra, "mel_cepstra", lambda wave, rate: next(both))
    assert mcd(noise(9), noise(9), RATE) == pytest.approx(DECIBELS * 0.5)


@pytest.mark.parametrize("order", [0, 1, 5, 13])
def test_a_filter_moves_the_cepstrum_it_should(order):
    """A filter whose log gain is a cosine over the mel scale moves one coefficient by its size."""
    wave = noise(4 * RATE)
    frequency = torch.fft.rfftfreq(len(wave), 1 / RATE, dtype=torch.float64)
    mel = 2595 * torch.log10(1 + frequency / 700)
    # The middle of band k, counted from 0, is edge k + 1 of BANDS + 2.
    place = (mel / mel[-1] * (BANDS + 1) - 0.5) / BANDS
    gain = torch.exp(0.2 * torch.cos(math.pi * order * place))
    filtered = torch.fft.irfft(torch.fft.rfft(wave.double()) * gain, n=len(wave))
    moved = (mel_cepstra(filtered, RATE) - mel_cepstra(wave, RATE)).mean(0)
    expected = torch.zeros(14, dtype=torch.float64)
    expected[order] = 0.2
    assert torch.allclose(moved, expected, atol=0.01)


def test_cepstra_by_hand():
    """One frame by explicit sums: Fourier, triangles, logarithm, cosines."""
    wave = speechlike(600, seed=3)
    window = [0.5 - 0.5 * math.cos(2 * math.pi * i / 600) for i in range(600)]
    samples = np.array(window) * wave.double().numpy() / sum(window)
    amplitude = np.array(
        [abs(sum(samples * np.exp(-2j * math.pi * k * np.arange(600) / 1024))) for k in range(513)]
    )

    def mel(frequency):
        return 2595 * math.log10(1 + frequency / 700)

    edges = [mel(RATE / 2) * k / (BANDS + 1) for k in range(BANDS + 2)]
    logs = []
    for left, middle, right in zip(edges, edges[1:], edges[2:], strict=False):
        places = [mel(RATE / 2 * k / 512) for k in range(513)]
        weights = np.array(
            [
                max(0, min((m - left) / (middle - left), (right - m) / (right - middle)))
                for m in places
            ]
        )
        if not weights.any():
            weights[np.argmin([abs(m - middle) for m in places])] = 1
        logs.append(math.log(max(weights @ amplitude / weights.sum(), 1e-5)))
    for order in range(14):
        cosines = [math.cos(math.pi * order * (k + 0.5) / BANDS) for k in range(BANDS)]
        expected = np.dot(logs, cosines) * (2 if order else 1) / BANDS
        assert float(mel_cepstra(wave, RATE)[0, order]) == pytest.approx(expected, abs=1e-9)


def slow_warping(first, second):
    """Over all paths, the smallest sum, and the mean along a path that has it."""

    @functools.cache
    def best(i, j):
        own = float(np.linalg.norm(first[i] - second[j]))
        before = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        ways = [best(*way) for way in before if min(way) >= 0]
        total, steps = min(ways, key=lambda way: way[0], default=(0.0, 0))
        return total + own, steps + 1

    total, steps = best(len(first) - 1, len(second) - 1)
    return total / steps


@pytest.mark.parametrize("sizes", [(1, 1), (1, 6), (6, 1), (5, 9), (12, 7)])
@pytest.mark.parametrize("seed", range(3))
def test_warping_by_recursion(sizes, seed):
    rng = np.random.default_rng(seed)
    first, second = (rng.normal(size=(size, 3)) for size in sizes)
    assert warped_distance(first, second) == pytest.approx(slow_warping(first, second))


def test_speed_does_not_count():
    frames = np.random.default_rng(0).normal(size=(20, 13))
    assert warped_distance(frames, frames.repeat(3, axis=0)) == 0


def test_a_short_recording_is_refused():
    for wave in (noise(599), noise(1200).view(2, 600)):
        with pytest.raises(ValueError, match=r"\[T\] with T of at least 600, 25 ms"):
            mel_cepstra(wave, RATE)


PAIRS = [
    ("the boat is amber", "the boat is amber", 0),
    ("The boat, is AMBER!", "the boat is amber", 0),
    ("the boat is amber", "the coat is amber", 1),
    ("the boat is amber", "boat is amber", 1),
    ("the boat is amber", "the old boat is really amber", 2),
    ("the boat is amber", "", 4),
    ("don't", "dont", 1),
]


def check_known_errors():
    for said, heard, errors in PAIRS:
        assert wer([said], [heard]) == pytest.approx(errors / len(words(said))), (said, heard)
        both = wer(["amber", said, "", "ivory"], ["coral", heard, "noise", "ivory"])
        assert both == pytest.approx((1 + errors) / (2 + len(words(said)))), (said, heard)


def test_known_errors(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_known_errors()


def test_known_errors_by_jiwer():
    pytest.importorskip("jiwer")
    check_known_errors()


@pytest.mark.parametrize("seed", range(10))
def test_edits_by_recursion(seed):
    rng = random.Random(seed)
    first, second = ("".join(rng.choices("abc", k=rng.randint(0, 9))) for _ in range(2))

    @functools.cache
    def fewest(i, j):
        if not i or not j:
            return i + j
        swapped = fewest(i - 1, j - 1) + (first[i - 1] != second[j - 1])
        return min(fewest(i - 1, j) + 1, fewest(i, j - 1) + 1, swapped)

    assert edits(first, second) == fewest(len(first), len(second))


def test_words_that_cannot_be_compared():
    with pytest.raises(ValueError, match=r"as many texts as said \(1\), got 2"):
        wer(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="at least one word, got none"):
        wer(["...", ""], ["a", "b"])


def test_similarity_is_the_cosine():
    assert similarity(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 1.0])) == pytest.approx(0.5**0.5)
    assert similarity(torch.tensor([1.0, 2.0]), torch.tensor([-2.0, -4.0])) == pytest.approx(-1)


def test_pieces_are_cut_anew():
    codes = torch.arange(23).view(1, 1, 23)
    for size in (1, 4, 23):
        found = list(regrouped(codes.split(size, 2), 10))
        assert [start for start, _ in found] == [0, 10]
        assert torch.equal(torch.cat([part for _, part in found], 2), codes[:, :, :20])


@torch.no_grad()
def test_decoding_goes_on_from_piece_to_piece():
    mimi, codes = tiny_mimi(context=1000), random_codes(tiny_lm(), 12)[:, 1:3]
    with decoding(mimi, 2) as decode:
        waves = torch.cat([decode(part) for part in codes.split([5, 1, 6], 2)], dim=1)
    assert torch.allclose(waves, mimi.decode(codes)[:, 0], atol=1e-5) and waves.std() > 1e-3
    assert waves.shape == (2, 12 * FRAME) and not mimi.is_streaming


class Recording:
    name = "recording"

    def __init__(self, model):
        self.model = model

    def pieces(self, rows, frames, seed):
        for part in random_codes(self.model, frames, rows, seed).split(7, 2):
            yield Piece(part, {})


class Letters:
    """A tokenizer whose tokens are words."""

    def decode(self, ids):
        return " ".join(f"word{token}" for token in ids)


def test_a_run_is_listened_to():
    model, mimi, seen = tiny_lm(), tiny_mimi(), []

    def embed(wave, rate):
        seen.append((wave, rate))
        return torch.tensor([1.0, len(seen)])

    given = {"tokenizer": Letters(), "segment": 6}
    found = speech(model, mimi, Recording(model), 20, 1, embed=embed, **given)
    assert json.loads(json.dumps(found)) == found
    assert [entry["start"] for entry in found["segments"]] == [0, 6, 12]  # 19 frames are whole
    assert all(wave.shape == (6 * FRAME,) and rate == RATE for wave, rate in seen)
    cosines = [3 / 10**0.5, 4 / 20**0.5]
    assert [entry["similarity"] for entry in found["segments"]] == [
        None,
        *map(pytest.approx, cosines),
    ]
    assert found["similarity"] == pytest.approx(sum(cosines) / 2) and found["wer"] is None
    texts = [entry["text"] for entry in found["segments"]]
    assert all(text for text in texts) and "word3 " not in " ".join(texts)

    heard = iter([texts[0], "", texts[2] + " more"])
    found = speech(model, mimi, Recording(model), 20, 1, transcribe=lambda *_: next(heard), **given)
    missed, total = len(words(texts[1])) + 1, sum(len(words(text)) for text in texts)
    assert found["wer"] == pytest.approx(missed / total) and found["similarity"] is None
    with pytest.raises(ValueError, match="got neither"):
        speech(model, mimi, Recording(model), 20, 1, **given)


@torch.no_grad()
def test_distortion_of_what_would_be_said_next():
    model, mimi = tiny_lm(), tiny_mimi(context=1000)
    ttt_cache.patch(model, **SMALL)
    codes = random_codes(model, 21)
    codes[1, 1, 2] = -1
    pieces = [Piece(part, {}) for part in codes.split(8, 2)]
    found = distortion(model, mimi, pieces, segment=5)
    assert json.loads(json.dumps(found)) == found
    assert [entry["start"] for entry in found["segments"]] == [0, 5, 10, 15]
    assert found["segments"][0]["mcd"][1] is None  # a code is missing
    out = model(codes)
    chosen = out.logits[:1].nan_to_num().argmax(-1)
    both = mimi.decode(torch.cat([chosen, codes[:1, 1:3]]))[:, 0].split(5 * FRAME, dim=1)
    for entry, (one, other) in zip(found["segments"], both, strict=False):
        assert entry["mcd"][0] == pytest.approx(mcd(one, other, RATE), rel=1e-3)
    known = [value for entry in found["segments"] for value in entry["mcd"] if value is not None]
    assert len(known) == 7 and found["mcd"] == pytest.approx(sum(known) / 7)


def test_a_torchscript_speaker_model(tmp_path):
    class Levels(torch.nn.Module):
        def forward(self, wave: torch.Tensor) -> torch.Tensor:
            return torch.stack([wave.abs().mean(1), torch.full_like(wave[:, 0], wave.shape[1])], 1)

    file = tmp_path / "speaker.pt"
    torch.jit.script(Levels()).save(str(file))
    embed = speaker_model(file)
    assert embed(torch.ones(16_000), 16_000).tolist() == [1, 16_000]
    assert embed(torch.ones(24_000), 24_000)[1] == 16_000


def test_models_of_transformers(monkeypatch):
    """A stand-in for the library: what it is asked, and that samples come at the rate it wants."""
    asked = []

    class Prepared(dict):
        def to(self, device):
            return self

    class Extractor:
        sampling_rate = 8_000

        def __call__(self, samples, sampling_rate, return_tensors):
            assert sampling_rate == 8_000 and return_tensors == "pt"
            return Prepared(values=torch.from_numpy(samples)[None])

    class Network(torch.nn.Module):
        def forward(self, values):
            return SimpleNamespace(embeddings=values[:, :3])

    def pipeline(task, model, device):
        asked.append((task, model))
        extractor = SimpleNamespace(sampling_rate=8_000)

        def recognise(given):
            return {"text": f"{len(given['raw'])} at {given['sampling_rate']}"}

        recognise.feature_extractor = extractor
        return recognise

    library = ModuleType("transformers")
    library.AutoFeatureExtractor = SimpleNamespace(from_pretrained=lambda name: Extractor())
    library.AutoModelForAudioXVector = SimpleNamespace(from_pretrained=lambda name: Network())
    library.pipeline = pipeline
    monkeypatch.setitem(sys.modules, "transformers", library)
    assert speaker_model("some/name")(torch.ones(24_000), 24_000).shape == (3,)
    assert speech_model("other/name")(torch.ones(8_000), 8_000) == "8000 at 8000"
    assert asked == [("automatic-speech-recognition", "other/name")]


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for load in (speaker_model, speech_model):
        with pytest.raises(RuntimeError, match="some/name needs the package transformers"):
            load("some/name")
