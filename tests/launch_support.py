"""Moshi's programs as a user runs them, with a checkpoint in Moshi's file formats made from seeds.

Its server is spoken to as `moshi.client` does: a handshake of one byte 0, then messages whose first
byte tells audio (1, an Ogg/Opus stream) from text (2), over a websocket.
"""

from __future__ import annotations

import copy
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import moshi.client_utils  # noqa: F401 - before CliRunner lends its stderr: it keeps what it finds
import numpy as np
import sphn
import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import CheckpointInfo, get_moshi_lm
from moshi.modules.lora import LoRALinear, replace_all_linear_with_lora
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from ttt_cache.cli import main
from ttt_cache.cli.report import NOT_MODEL

ROOT = Path(__file__).parents[1]
RATE, FRAME = 24_000, 1920
CONTEXT = 12  # frames: a ring that wraps in a second
# The beginning of a program that loads a checkpoint from its folder.
LOAD = """
import json, sys
from ttt_cache.patched import PatchedAttention
from moshi.models.loaders import CheckpointInfo
def load(folder, **options):
    return CheckpointInfo.from_hf_repo(
        "none/needed", folder + "/model.safetensors", folder + "/mimi.safetensors",
        folder + "/tokenizer.model", folder + "/config.json").get_moshi(**options)
"""
LAUNCH = ["-m", "ttt_cache.cli", "launch"]
SMALL = ["--recent", 6, "--chunk", 3, "--virtual", 3]
STOCK = ["--memory", "none", "--recent", CONTEXT]  # what makes the cache Moshi's own ring
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_WAIT_POLICY": "passive"}


class Checkpoint(NamedTuple):
    """A folder with the files that Moshi's flags name."""

    folder: Path

    def flags(
        self, config: str = "config.json", flag: str = "--config", weights: str = "model"
    ) -> list[object]:
        """Those of a program on the CPU; the server calls `--config` `--config-path`."""
        file = self.folder.joinpath
        return [
            *("--hf-repo", "none/needed", "--device", "cpu"),
            *("--tokenizer", file("tokenizer.model"), "--mimi-weight", file("mimi.safetensors")),
            *("--moshi-weight", file(f"{weights}.safetensors"), flag, file(config)),
        ]

    @property
    def speech(self) -> Path:
        return self.folder / "speech.wav"


def make_checkpoint(folder: Path) -> Checkpoint:
    """A small Moshi, its Mimi, its words and LoRA weights; nothing is downloaded."""
    torch.manual_seed(0)
    make = runpy.run_path(str(ROOT / "examples" / "make_small.py"))
    clip = make["read_clip"]()[..., : 30 * FRAME]
    make["make_moshi"](folder, make["make_tokenizer"](folder))
    make["make_mimi"](folder, clip)
    config = json.loads((folder / "config.json").read_text()) | {"context": CONTEXT}
    write_config(folder / "config.json", config)
    write_lora(folder / "lora.safetensors", config)
    lora = {"lora": True, "lora_rank": 2, "lora_name": f"file://{folder / 'lora.safetensors'}"}
    write_config(folder / "lora.json", config | lora)
    write_wav(folder / "speech.wav", clip[0, 0].numpy())
    return Checkpoint(folder)


def write_config(path: Path, config: dict[str, Any]) -> None:
    path.write_text(json.dumps(config))


def write_lora(path: Path, config: dict[str, Any]) -> None:
    """LoRA weights of rank 2 alone, as moshi-finetune writes them."""
    model = LMModel(**{k: v for k, v in config.items() if k not in NOT_MODEL})
    replace_all_linear_with_lora(model, 2, 2.0)
    generator = torch.Generator().manual_seed(3)
    for lora in (m for m in model.modules() if isinstance(m, LoRALinear)):
        for part in (lora.lora_A, lora.lora_B):
            torch.nn.init.normal_(part.weight, std=0.2, generator=generator)
    save_file({n: t for n, t in model.state_dict().items() if "lora" in n}, path)


# A voice is cross-attended, and a strength of guidance is given as a condition.
SPEAKER: dict[str, Any] = {
    "n_q": 4,
    "dep_q": 4,
    "delays": [0, 0, 1, 1, 1],
    "cross_attention": True,
    "demux_second_text_stream": True,
    "conditioners": {
        "speaker_wavs": {"type": "tensor", "tensor": {"dim": 16}},
        "control": {"type": "lut", "lut": {"n_bins": 2, "dim": 8, "tokenizer": "noop",
                                           "possible_values": ["ok"]}},
        "cfg": {"type": "lut", "lut": {"n_bins": 3, "dim": 8, "tokenizer": "noop",
                                       "possible_values": ["1.0", "2.0"]}},
    },
    "fuser": {"cross": ["speaker_wavs"], "sum": ["control", "cfg"],
              "cross_attention_pos_emb": True, "cross_attention_pos_emb_scale": 1},
    "tts_config": {"audio_delay": 0.16, "second_stream_ahead": 2},
    "model_id": {"sig": "small", "epoch": 1},
    "model_type": "tts",
}  # fmt: skip
VOICE = "alice.small@1.safetensors"


def add_speaker(checkpoint: Checkpoint, **changes: Any) -> Path:
    """A text-to-speech model beside the others, and a voice; returns its config."""
    folder = checkpoint.folder
    config = json.loads((folder / "config.json").read_text()) | SPEAKER | changes
    known = {k: v for k, v in config.items() if k not in NOT_MODEL}
    torch.manual_seed(4)
    model = get_moshi_lm(None, lm_kwargs=copy.deepcopy(known), dtype=torch.float32)
    save_file(model.state_dict(), folder / "tts.safetensors")
    save_file({"speaker_wavs": torch.randn(1, 16, 3)}, folder / VOICE)
    write_config(folder / "tts.json", config)
    return folder / "tts.json"


def write_wav(path: Path, samples: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((samples * 32767).astype("<i2").tobytes())


def frames_in(path: Path) -> float:
    with wave.open(str(path)) as file:
        assert file.getframerate() == RATE
        return file.getnframes() / FRAME


def program(*words: object, cwd: Path, **options: Any) -> subprocess.Popen:
    """Start `python words`, with its output in pipes."""
    command = [sys.executable, *(str(word) for word in words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | ENVIRONMENT
    return subprocess.Popen(command, cwd=cwd, env=environment, **(pipes | options))


class Ended(NamedTuple):
    status: int
    stdout: str
    stderr: str


def ended(*words: object, cwd: Path) -> Ended:
    """The same, run to its end."""
    process = program(*words, cwd=cwd)
    stdout, stderr = process.communicate(timeout=300)
    return Ended(process.returncode, stdout, stderr)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@contextmanager
def serving(*words: object, port: int, cwd: Path) -> Iterator[subprocess.Popen]:
    """A server that listens; the body ends it with `stop`, else it is killed."""
    process = program(*words, "--port", port, "--static", "none", cwd=cwd)
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            with socket.socket() as caller:
                if caller.connect_ex(("localhost", port)) == 0:
                    break
            time.sleep(0.1)
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        process.kill()
        process.wait()


def stop(process: subprocess.Popen) -> Ended:
    """Ctrl-C, and what the program said until its end."""
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    return Ended(process.returncode, stdout, stderr)


class Answer(NamedTuple):
    """What a conversation with the server brought: samples, text, and Opus bytes."""

    samples: np.ndarray
    text: str
    opus: bytes


async def converse(port: int, speech: np.ndarray, frames: int) -> Answer:
    """Say whole frames to the server, hear until it has answered with `frames` of them."""
    writer, reader = sphn.OpusStreamWriter(RATE), sphn.OpusStreamReader(RATE)
    heard, text, opus = [np.zeros(0, np.float32)], "", b""
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session,
        session.ws_connect(f"http://localhost:{port}/api/chat") as socket,
    ):
        assert await socket.receive_bytes() == b"\x00", "the handshake"
        for start in range(0, len(speech), FRAME):
            if packet := writer.append_pcm(speech[start : start + FRAME]):
                await socket.send_bytes(b"\x01" + packet)
        while sum(map(len, heard)) < frames * FRAME:
            kind, payload = (message := await socket.receive_bytes())[0], message[1:]
            assert kind in (1, 2), "audio or text"
            if kind == 2:
                text += payload.decode()
            else:
                opus += payload
                heard.append(reader.append_bytes(payload))
    return Answer(np.concatenate(heard), text, opus)


def call(*arguments: object) -> Result:
    """`ttt-cache launch arguments`, in this process."""
    return CliRunner().invoke(main, ["launch", *(str(argument) for argument in arguments)])


def as_left() -> tuple:
    """What a launch must leave as it was."""
    program = sys.argv, sys.path, sys.modules["__main__"]
    return CheckpointInfo.get_moshi, torch.cuda.synchronize, *program
