"""A checkpoint in Moshi's own file formats, made from seeds: what its programs' flags name."""

from __future__ import annotations

import copy
import json
import runpy
import wave
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from moshi.models.lm import LMModel
from moshi.models.loaders import get_moshi_lm
from moshi.modules.lora import LoRALinear, replace_all_linear_with_lora
from safetensors.torch import save_file

from ttt_cache.cli.report import NOT_MODEL

EXAMPLES = Path(__file__).parents[1] / "examples"
RATE, FRAME = 24_000, 1920
CONTEXT = 12  # frames: a ring that wraps in a second


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
    make = runpy.run_path(str(EXAMPLES / "make_small.py"))
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


def add_model(checkpoint: Checkpoint, name: str, **changes: Any) -> Path:
    """Another language model beside the first, for the same Mimi and words; returns its config."""
    folder = checkpoint.folder
    config = json.loads((folder / "config.json").read_text()) | changes
    known = {k: v for k, v in config.items() if k not in NOT_MODEL}
    torch.manual_seed(4)
    model = get_moshi_lm(None, lm_kwargs=copy.deepcopy(known), dtype=torch.float32)
    save_file(model.state_dict(), folder / f"{name}.safetensors")
    write_config(folder / f"{name}.json", config)
    return folder / f"{name}.json"


def add_speaker(checkpoint: Checkpoint, **changes: Any) -> Path:
    """A text-to-speech model, and a voice."""
    save_file({"speaker_wavs": torch.randn(1, 16, 3)}, checkpoint.folder / VOICE)
    return add_model(checkpoint, "tts", **SPEAKER | changes)


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
