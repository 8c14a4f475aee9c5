"""Moshi's own programs, launched as a user launches them, in processes of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sphn
from launch_files import FRAME, RATE, Checkpoint, frames_in
from launch_support import LAUNCH, SMALL, STOCK, Answer, converse, ended, free_port, serving, stop
from models import stir
from moshi.models.loaders import CheckpointInfo

import ttt_cache

# Moshi's server does not run without CUDA but for this line, which `launch` brings along.
SERVER = """
import runpy, torch
torch.cuda.synchronize = lambda: None
runpy.run_module("moshi.server", run_name="__main__", alter_sys=True)
"""
# Of 30 frames the stream's delay and the model's leave 28 answers.
ANSWERS = 28


@pytest.fixture(scope="module")
def adapter(small_moshi: Checkpoint) -> Path:
    """A memory whose weights matter, of layer 1."""
    file = small_moshi.folder.joinpath
    lm = CheckpointInfo.from_hf_repo(
        "none/needed", file("model.safetensors"), file("mimi.safetensors"),
        file("tokenizer.model"), file("config.json"),
    ).get_moshi()  # fmt: skip
    with ttt_cache.patch(lm, layers=[1], recent=6, chunk=3, virtual=3):
        stir(lm)
        return ttt_cache.save_adapter(lm, file("adapter"))


def test_speech_goes_in_and_speech_of_its_length_comes_out(
    small_moshi: Checkpoint, adapter: Path, tmp_path: Path
) -> None:
    arguments = [*small_moshi.flags(), "--batch-size", 2, small_moshi.speech, "out.wav"]
    trained = ["--ttt-cache", adapter, "moshi.run_inference"]
    status, stdout, stderr = ended(*LAUNCH, *trained, *arguments, cwd=tmp_path)
    assert status == 0, stderr
    assert "layers 1 of 2 on cpu keep 6 frames and memory ttt-mlp" in stderr
    assert "untrained" not in stderr and "ttt-cache" not in stdout
    for row in (0, 1):
        assert frames_in(tmp_path / f"out-{row}.wav") == frames_in(small_moshi.speech) == 30
    assert "with duration 2.4 sec" in stdout


def test_with_moshis_own_ring_inference_is_moshis_sample_for_sample(
    small_moshi: Checkpoint, tmp_path: Path
) -> None:
    arguments = ["moshi.run_inference", *small_moshi.flags(), "--batch-size", 1, small_moshi.speech]
    plain = ended("-m", *arguments, "plain.wav", cwd=tmp_path)
    ours = ended(*LAUNCH, *STOCK, *arguments, "ours.wav", cwd=tmp_path)
    assert plain.status == ours.status == 0, ours.stderr
    assert (tmp_path / "ours.wav").read_bytes() == (tmp_path / "plain.wav").read_bytes()
    assert ours.stdout.replace("ours", "plain") == plain.stdout, "its text, too"
    loud, _ = sphn.read(str(tmp_path / "ours.wav"), sample_rate=RATE)
    assert np.abs(loud).max() > 0.01


@pytest.fixture(scope="module")
def talk(small_moshi: Checkpoint) -> Callable[[int], Answer]:
    """One conversation with a server at a port."""
    speech, _ = sphn.read(str(small_moshi.speech), sample_rate=RATE)
    return lambda port: asyncio.run(converse(port, speech[0], ANSWERS))


def test_with_moshis_own_ring_the_server_says_what_moshis_says(
    small_moshi: Checkpoint, talk: Callable[[int], Answer], tmp_path: Path
) -> None:
    said = []
    for words in (["-c", SERVER], [*LAUNCH, *STOCK, "moshi.server"]):
        port = free_port()
        flags = small_moshi.flags(flag="--config-path")
        with serving(*words, *flags, port=port, cwd=tmp_path) as server:
            said.append([talk(port), talk(port)])
            assert stop(server).status == 0
    for plain, ours in zip(*said, strict=True):
        assert ours.text == plain.text != ""
        assert np.array_equal(ours.samples, plain.samples) and np.abs(ours.samples).max() > 0.01
        assert len(ours.samples) == ANSWERS * FRAME
    first, second = said[1]
    assert first.text != second.text, "sampled anew"


def test_the_server_speaks_moshis_protocol_and_ends_with_ctrl_c(
    small_moshi: Checkpoint, talk: Callable[[int], Answer], tmp_path: Path
) -> None:
    port, flags = free_port(), small_moshi.flags(flag="--config-path")
    with serving(*LAUNCH, *SMALL, "moshi.server", *flags, port=port, cwd=tmp_path) as server:
        for _ in range(2):  # one after the other
            answer = talk(port)
            assert len(answer.samples) == ANSWERS * FRAME and answer.text
        another = [*LAUNCH, *SMALL, "moshi.server", *flags, "--static", "none", "--port", port]
        refused = ended(*another, cwd=tmp_path)
        assert refused.status == 1 and refused.stderr.endswith(
            "ttt-cache: moshi.server: the port is in use; stop what listens there, or choose "
            "another --port\n"
        )
        assert talk(port).text, "the first one does not mind"
        status, stdout, stderr = stop(server)
    assert status == 0 and "Traceback" not in stderr
    assert stdout.count("done with connection") == 3
    assert "there is no CUDA" not in stderr, "--device cpu says so"
    assert "layers 0-1 of 2 on cpu" in stderr and "memory ttt-mlp is untrained" in stderr
