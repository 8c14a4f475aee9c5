"""Bad recordings are refused, by file and field, before anything is tokenised."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sphn
from data_support import RATE, noise, rewrite_line, write_data_set, write_transcript, write_wav
from hypothesis import given
from hypothesis import strategies as st

from ttt_cache.training.data.check import Recording, check_clips
from ttt_cache.training.data.manifest import read_manifest
from ttt_cache.training.data.transcript import read_transcript
from ttt_cache.training.data.wav import Wav


def check(manifest: Path, channels: int = 2) -> list[Recording]:
    return check_clips(read_manifest(manifest), RATE, 12.5, channels)


def refusal(manifest: Path, channels: int = 2) -> str:
    with pytest.raises(ValueError) as caught:
        check(manifest, channels)
    return str(caught.value)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write_data_set(tmp_path, [RATE, 30_000, RATE // 2])


def test_a_good_data_set(manifest: Path) -> None:
    rewrite_line(manifest, 1, path=str(manifest.parent / "wavs" / "1.wav"), more="ignored")
    manifest.write_text(manifest.read_text() + "\n")
    first, second, third = check(manifest)
    assert first.name == "wavs/0.wav"
    assert [each.wav.samples for each in (first, second, third)] == [RATE, 30_000, RATE // 2]
    assert first.speakers == {"SPEAKER_MAIN", "SPEAKER_OTHER"}


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{broken", "must be a JSON object"),
        ("[1, 2]", "must be a JSON object"),
        ('{"duration": 1.0}', "the field 'path' is missing"),
        ('{"path": "wavs/0.wav"}', "the field 'duration' is missing"),
        ('{"path": 3, "duration": 1.0}', "path must be the name of a WAV file, got 3"),
        ('{"path": "wavs/0.wav", "duration": "1"}', "duration must be a number of seconds"),
        ('{"path": "wavs/0.wav", "duration": true}', "duration must be a number of seconds"),
        (
            '{"path": "wavs/0.wav", "duration": -1}',
            "duration must be finite and above 0 seconds, got -1",
        ),
        (
            '{"path": "wavs/0.wav", "duration": NaN}',
            "duration must be finite and above 0 seconds, got nan",
        ),
        (
            '{"path": "wavs/0.wav", "duration": 1e999}',
            "duration must be finite and above 0 seconds, got inf",
        ),
        (f'{{"path": "wavs/0.wav", "duration": 1{"0" * 400}}}', "duration must be"),
        ('{"path": "wavs/9.wav", "duration": 1.0}', "path: there is no file"),
        ("\xff", "must be a JSON object"),
    ],
)
def test_bad_lines(manifest: Path, line: str, told: str) -> None:
    lines = manifest.read_bytes().splitlines()
    lines[1] = line.encode("latin-1")
    manifest.write_bytes(b"\n".join(lines))
    assert f"{manifest}:2: {told}" in refusal(manifest)


def test_missing_files(manifest: Path) -> None:
    (manifest.parent / "wavs" / "2.json").unlink()
    message = refusal(manifest)
    assert f"{manifest}:3: path: " in message and "wavs/2.json" in message
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        read_manifest(manifest.parent / "none.jsonl")


def test_an_empty_data_set(manifest: Path) -> None:
    manifest.write_text("\n \n")
    assert refusal(manifest) == f"{manifest} is empty: a data set needs at least one recording"


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    manifest = write_data_set(tmp_path, [RATE // 8] * 13)
    for number in range(12):
        rewrite_line(manifest, number, duration=None)
    lines = refusal(manifest).splitlines()
    assert len(lines) == 11 and f"{manifest}:10:" in lines[9]
    assert lines[10] == "and 2 more"


def test_wrong_rate_and_channels(manifest: Path) -> None:
    wavs = manifest.parent / "wavs"
    write_wav(wavs / "0.wav", noise(16_000), rate=16_000)
    write_wav(wavs / "1.wav", noise(30_000, channels=1))
    first, second = refusal(manifest).splitlines()
    assert first == f"{wavs / '0.wav'}: the rate must be 24000 Hz, got 16000 Hz: resample it"
    wanted = "must have 2 channels (left Moshi, right the user), got 1"
    assert second == f"{wavs / '1.wav'}: {wanted}"


def test_models_of_one_voice_take_one_channel_or_two(manifest: Path) -> None:
    path = manifest.parent / "wavs" / "1.wav"
    write_wav(path, noise(30_000, channels=1))
    assert len(check(manifest, channels=1)) == 3
    write_wav(path, noise(30_000, channels=3))
    assert f"{path}: must have 1 or 2 channels, got 3" in refusal(manifest, channels=1)


@pytest.mark.parametrize(("off", "fits"), [(0.085, True), (-0.085, True), (0.1, False)])
def test_duration_within_a_frame(manifest: Path, off: float, fits: bool) -> None:
    rewrite_line(manifest, 0, duration=1.0 + off)
    if fits:
        assert len(check(manifest)) == 3
    else:
        message = refusal(manifest)
        assert f"{manifest}:1: duration is 1.1 s" in message and "has 1.000 s" in message


def test_no_sound(manifest: Path) -> None:
    path = manifest.parent / "wavs" / "0.wav"
    write_wav(path, noise(0))
    rewrite_line(manifest, 0, duration=0.01)
    assert f"{path}: holds no sound, 0 samples" in refusal(manifest)


def test_nobody_speaks(manifest: Path) -> None:
    for path in (manifest.parent / "wavs").glob("*.json"):
        path.write_text(path.read_text().replace("SPEAKER_MAIN", "A"))
    message = refusal(manifest)
    assert "no transcript has a word of SPEAKER_MAIN" in message and "A, SPEAKER_OTHER" in message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "must be JSON"),
        ("[]", "must be an object with a list 'alignments'"),
        ('{"alignments": 3}', "must be an object with a list 'alignments'"),
        ('{"alignments": ["a"]}', 'alignments[0]: must be ["word", [start, end], "speaker"]'),
        ([["a", [0, 1], "M"], ["b", [0], "M"]], "alignments[1]: must be"),
        ([["a", [0, "1"], "M"]], "alignments[0]: must be"),
        ([["a", [0, True], "M"]], "alignments[0]: must be"),
        ([["a", [0, float("nan")], "M"]], "alignments[0]: must be"),
        ([[3, [0, 1], "M"]], "alignments[0]: must be"),
        ([["a", [0, 1], None]], "alignments[0]: must be"),
        ([["a", [0.5, 0.4], "M"]], "alignments[0]: 'a' ends at 0.4 s, before it starts at 0.5 s"),
        ([["a", [2, 3.1], "M"]], "alignments[0]: 'a' is said from 2 to 3.1 s"),
        ([["a", [-1.1, 0], "M"]], "alignments[0]: 'a' is said from -1.1 to 0 s"),
    ],
)
def test_bad_transcripts(manifest: Path, content: Any, told: str) -> None:
    path = manifest.parent / "wavs" / "0.json"
    text = content if isinstance(content, str) else json.dumps({"alignments": content})
    path.write_text(text)
    assert f"{path}: {told}" in refusal(manifest)


def test_words_a_little_outside_and_out_of_order_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    words = [["b", [1.5, 2.9], "M"], ["a", [-0.5, 0.5], "M"], ["c", [1.7, 1.7], "M"]]
    path.write_text(json.dumps({"alignments": words, "text_conditions": None}))
    assert [word.text for word in read_transcript(path, 2.0)] == ["a", "b", "c"]


@pytest.mark.parametrize("keep", [0, 3, 20, 40, 44, 1000])
def test_damaged_wavs(manifest: Path, keep: int) -> None:
    path = manifest.parent / "wavs" / "0.wav"
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(manifest)
    assert f"{path}: " in message
    assert ("cut off" if keep >= 44 else "WAV file") in message


def raw_wav(tag: int, bits: int, data: bytes, extensible: bool = False) -> bytes:
    """A WAV file of two channels, with a chunk of odd length before its data."""
    width = 2 * bits // 8
    layout = struct.pack(
        "<HHIIHH", 0xFFFE if extensible else tag, 2, RATE, RATE * width, width, bits
    )
    if extensible:
        layout += struct.pack("<HHIH14s", 22, bits, 3, tag, b"\0" * 14)
    chunks = [(b"fmt ", layout), (b"note", b"odd"), (b"data", data)]
    body = b"WAVE"
    for name, content in chunks:
        body += name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(("tag", "bits"), [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)])
def test_samples_are_those_that_sphn_reads(tmp_path: Path, tag: int, bits: int) -> None:
    random = np.random.default_rng(bits)
    if tag == 1:
        data = random.integers(0, 256, 100 * 2 * bits // 8, dtype=np.uint8).tobytes()
    else:
        data = random.uniform(-1, 1, 200).astype(f"<f{bits // 8}").tobytes()
    plain, extensible = tmp_path / "a.wav", tmp_path / "b.wav"
    plain.write_bytes(raw_wav(tag, bits, data))
    extensible.write_bytes(raw_wav(tag, bits, data, extensible=True))
    theirs, _ = sphn.read(str(plain))
    for wav in (Wav.open(plain), Wav.open(extensible)):
        assert (wav.samples, wav.channels, wav.rate) == (100, 2, RATE)
        samples = wav.read(0, 100)
        np.testing.assert_allclose(samples, theirs, atol=1e-7)
        np.testing.assert_array_equal(wav.read(30, 21), samples[:, 30:51])


@given(st.binary(max_size=80))
def test_any_bytes_are_refused_in_words(tmp_path_factory: pytest.TempPathFactory, tail: bytes):
    path = tmp_path_factory.mktemp("bytes") / "a.wav"
    path.write_bytes(b"RIFF\0\0\0\0WAVE" + tail)
    with pytest.raises(ValueError, match=r"a\.wav"):
        Wav.open(path)


def test_formats_that_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(raw_wav(6, 8, b"\0" * 10))  # A-law
    with pytest.raises(ValueError, match=r"a\.wav: must hold integers .* got format 6 with 8 bits"):
        Wav.open(path)


def test_samples_that_are_no_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(raw_wav(3, 32, struct.pack("<4f", 0, 1, float("nan"), 0)))
    with pytest.raises(ValueError, match=r"a\.wav: holds samples that are NaN"):
        Wav.open(path).read(0, 2)


def test_a_file_that_shrank_after_the_check(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    write_wav(path, noise(100))
    wav = Wav.open(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"a\.wav: has become shorter"):
        wav.read(0, 100)


def test_support_writes_what_it_says(tmp_path: Path) -> None:
    write_transcript(tmp_path / "a.json", 3.0)
    words = read_transcript(tmp_path / "a.json", 3.0)
    assert len(words) == 12 and words[0].text == "hello"
