"""Other kinds of Moshi models, launched: LoRA, float16, text to speech."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launch_support import (
    SMALL,
    STOCK,
    VOICE,
    Checkpoint,
    add_speaker,
    call,
    frames_in,
)


@pytest.mark.parametrize(("config", "half"), [("lora.json", []), ("config.json", ["--half"])])
def test_lora_and_half_sample_for_sample(
    config: str, half: list[str], small_moshi: Checkpoint, tmp_path: Path
) -> None:
    """LoRA as `run_inference` loads it, unfused; both in this process, one after the other."""
    flags = [*small_moshi.flags(config), "--batch-size", 1, *half, small_moshi.speech]
    outs = []
    for words in (STOCK, ["--layers", -1, *STOCK], SMALL):
        out = tmp_path / "out.wav"
        result = call(*words, "moshi.run_inference", *flags, out)
        assert result.exit_code == 0, result.output
        outs.append(out.read_bytes())
    assert outs[0] == outs[1] != outs[2]


@pytest.mark.parametrize("stock", [True, False])
def test_text_becomes_speech(stock: bool, small_moshi: Checkpoint, tmp_path: Path) -> None:
    add_speaker(small_moshi)
    voice = str(small_moshi.folder / VOICE[:5])
    request = {"turns": ["hello short clip"], "voices": [voice], "id": "a"}
    (tmp_path / "a.jsonl").write_text(json.dumps(request))
    flags = [*small_moshi.flags("tts.json", weights="tts"), "--nq", 4, "--out-folder", tmp_path]
    result = call(*(STOCK if stock else SMALL), "moshi.run_tts", *flags, tmp_path / "a.jsonl")
    assert result.exit_code == 0, (result.output, result.exception)
    assert frames_in(tmp_path / "a.wav") > 3
    assert "layers 0-1 of 2 on cpu" in result.stderr
