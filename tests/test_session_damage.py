"""Files that are no sessions, damaged or forged, or cannot be written: refused, nothing changed."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moshi.models.lm import LMGen
from safetensors import SafetensorError
from session_support import (
    begun,
    refused,
    remembered,
    saved,
    without_waiting_for_the_disk,  # noqa: F401
)

import ttt_cache
from ttt_cache import session_file


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("sessions"))


@pytest.fixture
def gen() -> LMGen:
    return begun()


def test_paths(gen, tmp_path):
    refused(gen, tmp_path / "none", FileNotFoundError, "none is not there")
    refused(gen, tmp_path, FileNotFoundError, "is a folder")
    with pytest.raises(TypeError):
        ttt_cache.load_session(gen, 3)
    with pytest.raises(IsADirectoryError, match="got the folder"):
        ttt_cache.save_session(gen, tmp_path)
    with pytest.raises(FileNotFoundError, match="file must be in a folder that exists"):
        ttt_cache.save_session(gen, tmp_path / "none" / "talk")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe is there and no regular file"):
        ttt_cache.save_session(gen, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_link_goes_on_pointing_to_the_session(gen, tmp_path):
    (tmp_path / "last").symlink_to(tmp_path / "talk")
    for _ in range(2):
        ttt_cache.save_session(gen, tmp_path / "last")
        assert (tmp_path / "last").is_symlink() and (tmp_path / "talk").is_file()


def test_a_full_disk_leaves_the_old_session(gen, file, tmp_path, monkeypatch):
    path = tmp_path / "talk"
    path.write_bytes(file.read_bytes())

    def full(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise SafetensorError(f"I/O error: {errno.ENOSPC}")

    monkeypatch.setattr(session_file, "save_file", full)
    with pytest.raises(OSError, match="talk could not be written: I/O error"):
        ttt_cache.save_session(gen, path)
    assert [p.name for p in tmp_path.iterdir()] == ["talk"]
    assert path.read_bytes() == file.read_bytes()


def test_every_truncation_and_every_altered_byte(gen, file, tmp_path):
    whole, path = file.read_bytes(), tmp_path / "talk"
    (header,) = struct.unpack("<Q", whole[:8])
    places = torch.randint(8 + header, len(whole), (60,), generator=torch.Generator()).tolist()
    names = torch.randint(0, 8 + header, (90,), generator=torch.Generator()).tolist()
    before = remembered(gen)
    for place in [0, 3, 8, 100, 8 + header, *places, len(whole) - 1]:
        path.write_bytes(whole[:place])
        with pytest.raises(ValueError, match=r"talk is truncated or not a safetensors file"):
            ttt_cache.load_session(gen, path)
    for place in [0, 7, 8, *places, *names, len(whole) - 1]:
        altered = bytearray(whole)
        altered[place] ^= 1 + place % 255
        path.write_bytes(altered)
        with pytest.raises(ValueError, match=r"talk is (truncated|damaged|not a session)|format"):
            ttt_cache.load_session(gen, path)
    assert remembered(gen) == before


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": 2, "version": "9.1"}, r"format must be 1, got 2: .* ttt_cache 9\.1"),
        ({"library": "another"}, "is not a session"),
        ({"conversations": 1}, "is damaged"),
        ({"checksum": None}, "is damaged"),
    ],
)
def test_descriptions(gen, file, tmp_path, changes, match):
    tensors, described = session_file.read_session(file)
    described["checksum"] = session_file.checksum(tensors, described)
    header = {session_file.KEY: json.dumps(described | changes)}
    session_file.save_file(tensors, tmp_path / "talk", header)
    refused(gen, tmp_path / "talk", ValueError, match)


def test_other_safetensors_files(gen, tmp_path):
    ttt_cache.save_adapter(gen.lm_model, tmp_path)
    refused(gen, tmp_path / "adapter_model.safetensors", ValueError, "is not a session")


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("generators.cpu", lambda t: t[:-1].clone(), "state of the cpu generator is none here"),
        ("generators.cpu", lambda t: t.short(), "state of the cpu generator is none here"),
        ("generators.cpu", torch.zeros_like, "state of the cpu generator is none here"),
        ("counters.gen.offset_cpu", lambda t: t[None].clone(), r"offset_cpu must be one .*int64"),
        ("counters.gen.offset_cpu", lambda t: t.float(), r"offset_cpu must be one .*float32"),
    ],
)
def test_what_a_batch_has_beside_its_rows(name, change, match, gen, file, tmp_path):
    """Of another version of torch, or forged with a checksum that is right."""
    tensors, described = session_file.read_session(file)
    tensors[name] = change(tensors[name])
    session_file.write_session(tmp_path / "talk", tensors, described)
    refused(gen, tmp_path / "talk", ValueError, match)


@pytest.mark.parametrize("missing", ["identity", "conversations", "whole_batch"])
def test_what_a_file_does_not_say(missing, gen, file, tmp_path):
    tensors, described = session_file.read_session(file)
    del described[missing]
    session_file.write_session(tmp_path / "talk", tensors, described)
    refused(gen, tmp_path / "talk", ValueError, f"it does not say its {missing}")


def test_killed_while_saving(tmp_path):
    """The old session or the new one, whole, whenever the process that saves is killed."""
    script = Path(__file__).with_name("session_process.py")
    command = [sys.executable, str(script), "kill", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0  # some were killed in the midst of writing
