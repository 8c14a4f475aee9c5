"""The cache: right, resumable after any kill, and never quietly damaged."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_support import (
    FACTS,
    FRAME,
    RATE,
    noise,
    tiny_mimi,
    tiny_tokenizer,
    write_data_set,
    write_wav,
)
from models import tiny_lm

from ttt_cache.training.data import LMFacts, SegmentStream, Sessions, TokenCache, prepare
from ttt_cache.training.data.shards import Index, verify
from ttt_cache.training.data.text import text_stream
from ttt_cache.training.data.transcript import read_transcript

LENGTHS = [20 * FRAME, 30_000, RATE, 12 * FRAME - 5, 9 * FRAME]


def make(manifest: Path, folder: Path, **changes: Any) -> TokenCache:
    settings = {
        "mimi": tiny_mimi(),
        "tokenizer": tiny_tokenizer(),
        "facts": FACTS,
        "shard_frames": 20,
        "progress": False,
    }
    return prepare(manifest, folder, **{**settings, **changes})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_set(tmp_path_factory.mktemp("data"), LENGTHS)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "cache"
    make(data, folder)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A finished cache of the test's own."""
    return Path(shutil.copytree(finished, tmp_path / "cache"))


def stamps(folder: Path) -> dict[str, int]:
    """When each shard was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_codes_are_text_then_left_then_right(data: Path, finished: Path) -> None:
    cache = TokenCache.open(finished)
    assert cache.frames == [-(-samples // FRAME) for samples in LENGTHS]
    mimi = tiny_mimi()
    mimi.set_num_codebooks(FACTS.dep_q)
    for number, codes in enumerate(cache.codes(range(len(LENGTHS)))):
        assert codes.dtype == torch.int32 and len(codes) == FACTS.codebooks
        sound = noise(LENGTHS[number], seed=number).T.astype(np.float32) / 32768
        with torch.no_grad():
            expected = mimi.encode(torch.from_numpy(sound)[:, None])
        assert torch.equal(codes[1:3], expected[0].int()), "left: Moshi"
        assert torch.equal(codes[3:5], expected[1].int()), "right: the user"
        seconds = LENGTHS[number] / RATE
        words = read_transcript(data.parent / f"wavs/{number}.json", seconds)
        text = text_stream(words, codes.shape[1], 12.5, tiny_tokenizer(), FACTS)
        assert torch.equal(codes[0], text)
        assert len(text.unique()) > 3


def test_recordings_fill_shards_in_order(finished: Path) -> None:
    index = Index.read(finished)
    assert [index.shards[i].frames for i in range(3)] == [[20], [16, 13], [12, 9]]
    names = [name for shard in index.shards.values() for name in shard.names]
    assert names == [f"wavs/{i}.wav" for i in range(len(LENGTHS))]
    assert sorted(path.name for path in finished.iterdir()) == [
        ".lock",
        "index.json",
        *(f"shard-0000{i}.safetensors" for i in range(3)),
    ]


def test_a_finished_cache_is_left_alone(data: Path, folder: Path) -> None:
    before, written = contents(folder), stamps(folder)
    cache = make(data, folder, shard_frames=1_000)
    assert contents(folder) == before and stamps(folder) == written
    assert cache.frames == TokenCache.open(folder).frames


def test_from_files_to_batches(data: Path, finished: Path) -> None:
    sessions = Sessions(TokenCache.open(finished), session_frames=30)
    assert sessions.frames == [36, 34]
    assert sessions.recordings == [range(2), range(2, 5)]
    whole = torch.cat(list(sessions.cache.codes(range(2))), dim=1)
    assert torch.equal(sessions.codes(0), whole)
    stream = SegmentStream(sessions, FACTS, total_rows=2)
    batch = stream.next_batch(40)
    assert torch.equal(batch.codes[0, :, :37], FACTS.delayed(whole).long())
    out = tiny_lm()(sessions.codes(0)[None].long())
    assert out.mask.any() and out.text_mask.any(), "codes that the model takes"
    single = Sessions(sessions.cache)
    assert single.frames == sessions.cache.frames


def test_models_of_one_voice(tmp_path: Path) -> None:
    facts = LMFacts.of(tiny_lm(n_q=2, delays=[0, 0, 1]))
    manifest = write_data_set(tmp_path / "mono", [RATE], channels=1)
    mono = make(manifest, tmp_path / "a", facts=facts)
    sound = np.concatenate([noise(RATE, 1), noise(RATE, 1, seed=9)], axis=1)
    write_wav(manifest.parent / "wavs" / "0.wav", sound)
    stereo = make(manifest, tmp_path / "b", facts=facts)
    assert torch.equal(next(mono.codes([0])), next(stereo.codes([0]))), "the left channel"


def until_shards(folder: Path, count: int) -> None:
    """Wait until the index of a running job lists so many shards."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if (folder / "index.json").exists() and len(Index.read(folder).shards) >= count:
            return
        time.sleep(0.001)
    raise TimeoutError(f"no {count} shards within 30 s")


def test_kill_9_loses_no_finished_shard(tmp_path: Path) -> None:
    manifest = write_data_set(tmp_path, [(10 + i) * FRAME for i in range(16)])
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    make(manifest, straight, shard_frames=1)
    chance = random.Random(0)
    kept: dict[str, int] = {}
    for shards in (0, 2, 5, 9, 12):
        job = multiprocessing.get_context("fork").Process(
            target=make, args=(manifest, killed), kwargs={"shard_frames": 1}
        )
        job.start()
        until_shards(killed, shards)
        time.sleep(chance.uniform(0, 0.01))
        assert job.pid is not None
        os.kill(job.pid, signal.SIGKILL)
        job.join()
        assert job.exitcode == -signal.SIGKILL, "it was not finished yet"
        index = Index.read(killed)
        for shard in index.shards.values():
            verify(killed, shard)
        assert kept.items() <= stamps(killed).items(), "finished shards are not made again"
        kept = {name: time for name, time in stamps(killed).items() if name in str(index.shards)}
        with pytest.raises(ValueError, match=r"killed is unfinished: \d+ of 16 shards are there"):
            TokenCache.open(killed)
    make(manifest, killed, shard_frames=1)
    assert kept.items() <= stamps(killed).items()
    assert contents(killed) == contents(straight), "and nothing half-written is left"


def fill_disk_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """Let the `call`-th use of a method of Path write half of its data, then fail."""
    whole, calls = getattr(Path, name), []

    def write(self: Path, data: Any) -> int:
        calls.append(self)
        if len(calls) == call:
            whole(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(self, data)

    monkeypatch.setattr(Path, name, write)


@pytest.mark.parametrize(("name", "call"), [("write_bytes", 2), ("write_text", 3)])
def test_full_disk(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: Any, name: str, call: int
) -> None:
    """Once while the second shard is written, once while the index that names it is."""
    folder = tmp_path / "cache"
    with monkeypatch.context() as patch:
        fill_disk_at(patch, name, call)
        with pytest.raises(OSError, match="1 of 3 shards are finished and stay") as caught:
            make(data, folder)
    assert caught.value.errno == errno.ENOSPC
    assert "shard-00001.safetensors" in str(caught.value) and "No space left" in str(caught.value)
    left = {path.name for path in folder.iterdir()}
    assert left == {".lock", "index.json", "shard-00000.safetensors"}
    written = stamps(folder)
    make(data, folder)
    assert written.items() <= stamps(folder).items()
    assert contents(folder) == contents(finished)


def test_too_little_room_is_told_at_the_start(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=70 * 5 * 4 - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="codes still to make need") as caught:
        make(data, tmp_path / "cache")
    assert caught.value.errno == errno.ENOSPC
    assert not list((tmp_path / "cache").glob("shard*"))


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[:-1])
    elif how == "corrupt":
        content[-3] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("truncated", r"shard-00001\.safetensors has \d+ bytes, \d+ were written: delete"),
        ("corrupt", r"shard-00001\.safetensors is corrupt .*: delete"),
        ("missing", r"shard-00001\.safetensors is missing: tokenise again, only this shard"),
    ],
)
def test_damaged_shards_are_named_and_made_anew(
    data: Path, finished: Path, folder: Path, how: str, told: str
) -> None:
    shard = folder / "shard-00001.safetensors"
    damage(shard, how)
    with pytest.raises(ValueError, match=told):
        TokenCache.open(folder)
    if how != "missing":
        with pytest.raises(ValueError, match=told):
            make(data, folder)
        shard.unlink()  # what the message says
    written = stamps(folder)
    make(data, folder)
    assert written.items() <= stamps(folder).items(), "the others stay"
    assert contents(folder) == contents(finished)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "shards": {"x": {}}}', "\xff"])
def test_a_damaged_index(folder: Path, text: str) -> None:
    (folder / "index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"index\.json is damaged .*: delete .* tokenise anew"):
        TokenCache.open(folder)


def test_an_index_of_another_version(folder: Path) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(ValueError, match=r"index\.json: format must be 1, got 2"):
        TokenCache.open(folder)
    with pytest.raises(FileNotFoundError, match=r"index\.json"):
        TokenCache.open(folder.parent)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mimi": "other"}, "weights of Mimi"),
        ({"tokenizer": "other"}, "text tokenizer"),
        ({"facts": "other"}, "codebooks or padding tokens of the model"),
    ],
)
def test_a_cache_of_something_else(
    data: Path, folder: Path, changes: dict[str, str], named: str
) -> None:
    others = {
        "mimi": tiny_mimi(seed=1),
        "tokenizer": tiny_tokenizer(28),
        "facts": LMFacts.of(tiny_lm(existing_text_padding_id=5)),
    }
    before = contents(folder)
    with pytest.raises(ValueError, match=f"the cache was made from other {named}: give another"):
        make(data, folder, **{name: others[name] for name in changes})
    assert contents(folder) == before


def test_a_cache_of_other_recordings(folder: Path, tmp_path: Path) -> None:
    manifest = write_data_set(tmp_path / "other", LENGTHS[1:])
    with pytest.raises(ValueError, match="the cache was made from other recordings"):
        make(manifest, folder)


def test_delays_are_not_in_the_cache(data: Path, folder: Path) -> None:
    make(data, folder, facts=LMFacts.of(tiny_lm(delays=[0, 0, 2, 0, 2])))


def test_codec_and_tokenizer_must_fit_the_model(data: Path, tmp_path: Path) -> None:
    for lm, told in (
        (tiny_lm(card=31), "at least 2 codebooks of 31 codes"),
        (tiny_lm(n_q=5, dep_q=5, delays=[0] * 6), "at least 5 codebooks of 30 codes"),
        (tiny_lm(text_card=10), "tokenizer must have at most 10 tokens"),
    ):
        with pytest.raises(ValueError, match=told):
            make(data, tmp_path / "cache", facts=LMFacts.of(lm))
    with pytest.raises(ValueError, match="shard_frames must be at least 1"):
        make(data, tmp_path / "cache", shard_frames=0)
    assert not (tmp_path / "cache").exists()


def test_bad_recordings_are_told_before_work(data: Path, tmp_path: Path) -> None:
    manifest = write_data_set(tmp_path, [RATE, RATE])
    write_wav(tmp_path / "wavs" / "1.wav", noise(RATE, channels=1))
    with pytest.raises(ValueError, match=r"1\.wav: must have 2 channels"):
        make(manifest, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_one_writer_and_any_readers(data: Path, folder: Path) -> None:
    """A finished cache is opened without its lock, which a read-only one could not have."""
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert make(data, folder).frames
        (folder / "shard-00000.safetensors").unlink()
        with pytest.raises(RuntimeError, match="another process is writing this cache"):
            make(data, folder)


def test_what_a_person_sees(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    make(data, tmp_path / "cache", progress=True)
    shown = capfd.readouterr().err
    assert "Checking recordings" in shown and "Tokenising 0.00156 h of sound" in shown
    make(data, tmp_path / "cache")
    assert capfd.readouterr().err == ""
