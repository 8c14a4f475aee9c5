"""What is refused: in one clear sentence, before anything has changed."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from data_support import tiny_mimi
from models import tiny_lm
from moshi.models.lm import LMGen
from moshi.modules.streaming import State
from safetensors import SafetensorError
from session_support import (
    conditioned,
    frames,
    moshi,
    remembered,
    say,
    talk,
    without_waiting_for_the_disk,  # noqa: F401
)

import ttt_cache
from ttt_cache import session_file

SETTINGS = {"layers": [0, 2]}
Change = Callable[[], LMGen]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """Two conversations of 20 frames."""
    gen = talk(moshi(SETTINGS), 2)
    say(gen, frames(gen.lm_model, 20, 2))
    return ttt_cache.save_session(gen, tmp_path_factory.mktemp("sessions") / "talk")


@pytest.fixture
def gen() -> LMGen:
    """Two others, with the same model."""
    gen = talk(moshi(SETTINGS), 2)
    say(gen, frames(gen.lm_model, 9, 2, seed=4))
    return gen


def refused(gen: LMGen, file: Path, error: type[Exception], match: str, **given) -> None:
    before = remembered(gen)
    with pytest.raises(error, match=match):
        ttt_cache.load_session(gen, file, **given)
    assert remembered(gen) == before


def other_weight() -> LMGen:
    model = moshi(SETTINGS)
    with torch.no_grad():
        model.transformer.layers[1].gating.linear_in.weight.add_(1e-3)
    return talk(model, 2)


def other_adapter() -> LMGen:
    model = moshi(SETTINGS)
    with torch.no_grad():
        ttt_cache.adapter_parameters(model)[3].mul_(1.01)
    return talk(model, 2)


def without_patch() -> LMGen:
    return talk(tiny_lm(), 2)


def other_period() -> LMGen:
    return talk(moshi(SETTINGS, max_period=9999), 2)


OTHERS: dict[str, tuple[Change, str]] = {
    "weights": (
        lambda: talk(moshi(SETTINGS, seed=7), 2),
        r"model\.weights: the session was saved with \w+, here it is \w+",
    ),
    "one weight": (other_weight, r"model\.weights: "),
    "adapter": (other_adapter, r"model\.adapter: "),
    "codebooks": (
        lambda: talk(moshi(SETTINGS, n_q=5, delays=[0, 0, 1, 0, 1, 1]), 2),
        r"model\.codebooks: the session was saved with 5, here it is 6",
    ),
    "delays": (
        lambda: talk(moshi(SETTINGS, delays=[0, 0, 0, 0, 1]), 2),
        r"model\.delays: .* with \[0, 0, 1, 0, 1\], here it is \[0, 0, 0, 0, 1\]",
    ),
    "width": (lambda: talk(moshi(SETTINGS, dim=64), 2), r"model\.dim: .* 32, here it is 64"),
    "context": (lambda: talk(moshi(SETTINGS, context=50), 2), r"model\.context: .* here it is 50"),
    "rotation": (other_period, r"model\.structure: .* built otherwise"),
    "dtype": (
        lambda: talk(moshi(SETTINGS, dtype=torch.bfloat16), 2),
        r"model\.dtype: the session was saved with float32, here it is bfloat16",
    ),
    "no patch": (without_patch, r"model\.patched: .* here it is \[\]"),
    "layers": (
        lambda: talk(moshi({"layers": [0, 1]}), 2),
        r"model\.patched: .*layers\.2\.self_attn'\], here it is .*layers\.1\.self_attn'\]",
    ),
    "window": (
        lambda: talk(moshi({"layers": [0, 2], "recent": {0: 6, 2: 7}}), 2),
        r"settings\.transformer\.layers\.2\.self_attn\.recent: .* with 6, here it is 7",
    ),
    "gate": (
        lambda: talk(moshi({"layers": [0, 2], "gate": "head"}), 2),
        r"settings\.transformer\.layers\.0\.self_attn\.gate: .* with joint, here it is head",
    ),
    "guidance": (
        lambda: talk(moshi(SETTINGS), 2, cfg_coef=2.0, cfg_is_no_text=True),
        "guidance: the session was saved with False, here it is True",
    ),
    "batch": (
        lambda: talk(moshi(SETTINGS), 3),
        "holds 2 conversations, and gen streams 3 conversations: name the rows",
    ),
    "masked guidance": (
        lambda: talk(moshi(SETTINGS), 2, cfg_is_masked_until=[3, 3]),
        r"gen\.cfg_is_masked_until is in use here, and the session has none",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_session_of_something_else(other, file):
    make, match = OTHERS[other]
    refused(make(), file, ValueError, match)


def test_settings_that_change_nothing_in_a_conversation(file):
    gen = talk(moshi({**SETTINGS, "bptt": 2, "preset": "memory-bank"}), 2)
    ttt_cache.load_session(gen, file)


def test_conditions_that_are_not_in_use(tmp_path):
    model, told = conditioned("sum", ["calm", "glad"])
    gen = talk(model, 2, condition_tensors=told)
    path = ttt_cache.save_session(gen, tmp_path / "talk")
    gen._streaming_state.condition_sum = None
    refused(gen, path, ValueError, r"gen\.condition_sum is in the session, and not in use here")


def test_a_state_of_another_dtype(gen, file):
    attention = gen.lm_model.transformer.layers[1].self_attn
    ring = attention._streaming_state.kv_cache
    ring.cache = ring.cache.double()
    match = r"kv_cache\.cache must be torch\.float64 of shape .* got torch\.float32"
    refused(gen, file, ValueError, match)


@pytest.mark.parametrize(
    ("row", "error", "match"),
    [
        (2, ValueError, "row must be at most 1, got 2"),
        (-1, ValueError, "row must be at least 0, got -1"),
        (True, TypeError, "row must be an integer"),
        (0.5, TypeError, "row must be an integer"),
        ("0", TypeError, "row must be an integer"),
        ([0, 2], ValueError, "row must be at most 1, got 2"),
        ([], ValueError, "row must name each row once, and at least one"),
        ([1, 1], ValueError, "row must name each row once"),
        (1, ValueError, r"row must name 2 rows, as many as .* got \[1\]"),
    ],
)
def test_rows(gen, file, row, error, match, tmp_path):
    refused(gen, file, error, match, row=row)
    if not isinstance(row, list) and row != 1:
        with pytest.raises(error, match=match):
            ttt_cache.save_session(gen, tmp_path / "talk", row=row)
        assert not list(tmp_path.iterdir())


def test_models_that_are_not_streaming_or_no_models(gen, file, tmp_path):
    mimi = tiny_mimi()  # which other tests have used
    mimi.set_num_codebooks(4)
    at_rest = LMGen(tiny_lm())
    for wrong, given, error, match in [
        (gen.lm_model, {}, TypeError, "gen must be a moshi LMGen, got LMModel"),
        (at_rest, {}, RuntimeError, r"gen is not streaming: .* gen\.streaming\(batch_size\)"),
        (gen, {"mimi": gen}, TypeError, "mimi must be a MimiModel or None, got LMGen"),
        (gen, {"mimi": mimi}, RuntimeError, "mimi is not streaming"),
    ]:
        refused(wrong, file, error, match, **given)
        with pytest.raises(error, match=match):
            ttt_cache.save_session(wrong, tmp_path / "talk", **given)
    with mimi.streaming(3):
        refused(gen, file, ValueError, "mimi must stream 2 rows as gen does, got 3", mimi=mimi)
    with mimi.streaming(2):
        refused(gen, file, ValueError, "holds no Mimi: give none", mimi=mimi)
        path = ttt_cache.save_session(gen, tmp_path / "with", mimi=mimi)
        refused(gen, path, ValueError, "holds a Mimi: give mimi too")
        mimi.set_num_codebooks(3)
        refused(gen, path, ValueError, r"mimi\.codebooks: .* with 4, here it is 3", mimi=mimi)
        mimi.set_num_codebooks(4)
        ttt_cache.load_session(gen, path, mimi=mimi)


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


def test_states_that_are_not_known(gen, file, tmp_path):
    @dataclasses.dataclass
    class Novel(State):
        more: int = 0

    transformer = gen.lm_model.transformer
    known, transformer._streaming_state = transformer._streaming_state, Novel(2, "cpu")
    match = r"lm_model\.transformer has a streaming state of the type .*Novel"
    refused(gen, file, RuntimeError, match)
    with pytest.raises(RuntimeError, match=match):
        ttt_cache.save_session(gen, tmp_path / "talk")
    transformer._streaming_state = known
    kind = type(known)
    grown = dataclasses.make_dataclass("grown", [("more", int, 0)], bases=(kind,))
    grown.__module__, grown.__qualname__ = kind.__module__, kind.__qualname__
    known.__class__ = grown
    refused(gen, file, RuntimeError, "has a field 'more' that sessions do not know")


def test_killed_while_saving(tmp_path):
    """The old session or the new one, whole, whenever the process that saves is killed."""
    script = Path(__file__).with_name("session_process.py")
    command = [sys.executable, str(script), "kill", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0  # some were killed in the midst of writing
