"""Other kinds of Moshi models, launched: LoRA, float16, speech to text and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launch_files import CONTEXT, VOICE, Checkpoint, add_model, add_speaker, frames_in
from launch_support import SMALL, STOCK, call, plainly
from moshi.client_utils import RawPrinter


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "out.wav"


@pytest.mark.parametrize(("config", "half"), [("lora.json", []), ("config.json", ["--half"])])
def test_inference_sample_for_sample(
    config: str, half: list[str], small_moshi: Checkpoint, file: Path
) -> None:
    """LoRA as `run_inference` loads it, which is unfused; and float16."""
    flags = [*small_moshi.flags(config), "--batch-size", 1, *half, small_moshi.speech, file]
    plainly("moshi.run_inference", *flags)
    stock, patched = file.read_bytes(), []
    for words in (STOCK, ["--layers", -1, *STOCK], SMALL):
        result = call(*words, "moshi.run_inference", *flags)
        assert result.exit_code == 0, result.output
        patched.append(file.read_bytes())
    assert patched[0] == patched[1] == stock != patched[2]


def test_speech_becomes_text(small_moshi: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = {"dep_q": 0, "model_type": "stt", "stt_config": {"audio_delay_seconds": 0.5}}
    add_model(small_moshi, "stt", **listener)
    program = "moshi.run_inference", *small_moshi.flags("stt.json", weights="stt")
    told: list[str] = []
    monkeypatch.setattr(RawPrinter, "print_token", lambda _, token, *__: told.append(token))
    plainly(*program, small_moshi.speech)
    texts = [told.copy()]
    for words in (STOCK, SMALL):
        told.clear()
        result = call(*words, *program, small_moshi.speech)
        assert result.exit_code == 0 and "writing" not in result.stdout, result.output
        texts.append(told.copy())
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) > CONTEXT


def test_text_becomes_speech(small_moshi: Checkpoint, tmp_path: Path) -> None:
    """`run_tts` draws no seed of its own; voices and guidance are conditions."""
    add_speaker(small_moshi)
    voice = str(small_moshi.folder / VOICE[:5])
    request = {"turns": ["hello short clip"], "voices": [voice], "id": "a"}
    (tmp_path / "a.jsonl").write_text(json.dumps(request))
    flags = [*small_moshi.flags("tts.json", weights="tts"), "--nq", 4, "--out-folder", tmp_path]
    spoken = []
    for words in (None, STOCK, SMALL):
        torch.manual_seed(7)
        program = "moshi.run_tts", *flags, tmp_path / "a.jsonl"
        if words is None:
            plainly(*program)
        else:
            result = call(*words, *program)
            assert result.exit_code == 0, result.output
            assert "layers 0-1 of 2 on cpu" in result.stderr
        assert frames_in(tmp_path / "a.wav") > CONTEXT
        spoken.append((tmp_path / "a.wav").read_bytes())
    assert spoken[0] == spoken[1] != spoken[2]
