"""Every kind of model that Moshi's code runs, patched, through its real generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from coverage_kinds import CONTEXT, KINDS, generated, listen, parallel
from launch_files import SPEAKER, VOICE, Checkpoint, add_speaker
from models import SMALL, assert_near, stir, tiny_lm
from moshi.models.loaders import CheckpointInfo
from moshi.models.tts import TTSModel
from moshi.utils.quantize import QLinear

import ttt_cache

LENGTH = 40
STOCK = {"memory": "none", "recent": CONTEXT}
# Of the scale: 16 bits differ by their rounding, of int8 a rounding may turn a whole step of 1/127.
# Both forms round in every layer, each where it does; a wrong memory is off by its scale.
ROUNDINGS = 8 * torch.finfo(torch.bfloat16).eps
TOLERANCE = {"bfloat16": ROUNDINGS, "int8": ROUNDINGS}


@pytest.mark.parametrize("name", KINDS)
def test_with_moshis_own_ring_it_is_stock(name: str, tmp_path: Path) -> None:
    kind = KINDS[name](tmp_path)
    stock = generated(kind, LENGTH)
    with ttt_cache.patch(kind.model, **STOCK):
        patched = generated(kind, LENGTH)
    assert torch.equal(patched.inputs, stock.inputs), "every token"
    if name in TOLERANCE:
        assert torch.equal(patched.logits, stock.logits), "in 16 bits every bit"
    assert_near(patched.logits, stock.logits)


@pytest.mark.parametrize("name", KINDS)
def test_streaming_is_the_parallel_form(name: str, tmp_path: Path) -> None:
    kind = KINDS[name](tmp_path)
    stock = generated(kind, LENGTH)
    ttt_cache.patch(kind.model, **SMALL)
    stir(kind.model)
    heard = generated(kind, LENGTH)
    assert heard.logits.isfinite().all()
    assert not torch.equal(heard.logits, stock.logits), "the memory is read"
    assert_near(heard.logits, parallel(kind.model, heard), TOLERANCE.get(name, 1e-5))


VOICED: dict[str, Any] = SPEAKER["conditioners"]
SPOKEN = {
    "guidance as a condition": {},
    "guided": {
        "conditioners": {k: v for k, v in VOICED.items() if k != "cfg"},
        "fuser": SPEAKER["fuser"] | {"sum": ["control"]},
    },
    "voice as a prefix": {
        "conditioners": {"control": VOICED["control"]},
        "fuser": {"sum": ["control"]},
        "cross_attention": False,
    },
}


@pytest.mark.parametrize("name", SPOKEN)
def test_text_to_speech(name: str, small_moshi: Checkpoint) -> None:
    """Moshi's own `TTSModel.generate`, two requests at once."""
    config = add_speaker(small_moshi, **SPOKEN[name])
    file = small_moshi.folder.joinpath
    names = ("tts.safetensors", "mimi.safetensors", "tokenizer.model")
    info = CheckpointInfo.from_hf_repo("none/needed", *map(file, names), config)
    tts = TTSModel.from_checkpoint_info(info, dtype=torch.float32, n_q=4, temp=0.5)
    tts.cfg_coef = 2.0 if name != "guidance as a condition" else 1.0
    voices = [file(VOICE)] if tts.multi_speaker else []
    conditions = tts.make_condition_attributes(voices, None if tts.cfg_coef != 1 else 2.0)
    prefix = None if voices else [tts.get_prefix(small_moshi.speech)[:, :8]] * 2
    scripts = [tts.prepare_script([text], 1) for text in ("hello short clip", "of speech")]

    def generate() -> None:
        torch.manual_seed(9)
        said.append(tts.generate(scripts, [conditions] * 2, prefixes=prefix))

    said: list[Any] = []
    stock = listen(tts.lm, generate)
    assert len(stock.inputs) == (4 if tts.cfg_coef != 1 else 2), "guidance doubles the rows"
    with ttt_cache.patch(tts.lm, **STOCK):
        whole = listen(tts.lm, generate)
    assert torch.equal(whole.inputs, stock.inputs) and said[0].end_steps == said[1].end_steps
    assert_near(whole.logits, stock.logits)
    ttt_cache.patch(tts.lm, **SMALL)
    stir(tts.lm)
    heard = listen(tts.lm, generate)
    assert heard.inputs.shape[2] > CONTEXT and None not in said[2].end_steps
    assert_near(heard.logits, parallel(tts.lm, heard))


def test_int8_leaves_the_cache_in_its_own_dtypes(tmp_path: Path) -> None:
    """Rings are float16 as in Moshi, fast weights float32; no weight of the patch is quantised."""
    model = tiny_lm(context=CONTEXT, quantize=True)
    handle = ttt_cache.patch(model, **SMALL)
    stir(model)
    for cache in handle.caches.values():
        assert not any(isinstance(module, QLinear) for module in cache.modules())
        state = cache.init_state(1)
        assert state.keys.dtype == torch.float16
        assert {t.dtype for t in state.memory.values()} == {torch.float32}
    scales = [p for n, p in model.named_parameters() if n.endswith("weight_scb")]
    assert scales and all(scale.dtype == torch.float32 for scale in scales)
    halved = ttt_cache.report(tiny_lm(context=CONTEXT).half())
    assert ttt_cache.report(model).stock_bytes == halved.stock_bytes
    ttt_cache.save_adapter(model, tmp_path)
    before = [p.clone() for p in ttt_cache.adapter_parameters(model)]
    handle.remove()
    ttt_cache.load_adapter(model, tmp_path)
    assert all(map(torch.equal, ttt_cache.adapter_parameters(model), before))
