"""A whole batch saved and restored: it goes on bit for bit, sampling included."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from data_support import FRAME, tiny_mimi
from hypothesis import given
from hypothesis import strategies as st
from models import tiny_lm
from moshi.modules.lora import replace_all_linear_with_lora
from moshi.utils.quantize import replace_linear_with_qlinear
from session_support import (
    begin_anew,
    conditioned,
    frames,
    moshi,
    places,
    remembered,
    same,
    say,
    talk,
    without_waiting_for_the_disk,  # noqa: F401
)
from test_presets import small

import ttt_cache
from ttt_cache.presets import PRESETS

MOODS = ["calm", "glad"]
BEFORE, AFTER = 23, 15  # steps: several versions of the memory, in the middle of a chunk


def goes_on(gen, file, batch: int = 2) -> None:
    """Save, go on, restore and go on again; then the same from an empty state."""
    codes = frames(gen.lm_model, BEFORE + AFTER, batch)
    first, rest = codes.split([BEFORE, AFTER], dim=2)
    say(gen, first)
    ttt_cache.save_session(gen, file)
    saved = remembered(gen)
    expected = say(gen, rest)
    at_end = remembered(gen)
    ttt_cache.load_session(gen, file)
    assert remembered(gen) == saved
    assert same(say(gen, rest), expected)
    torch.manual_seed(99)
    begin_anew(gen, batch=batch)
    ttt_cache.load_session(gen, file)
    assert remembered(gen) == saved
    assert same(say(gen, rest), expected)
    assert remembered(gen) == at_end


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset(preset, tmp_path):
    goes_on(talk(moshi(small(preset), num_layers=2), 2), tmp_path / "talk")


@pytest.mark.parametrize("layers", [[1], [0, 2]])
def test_some_layers_patched(layers, tmp_path):
    goes_on(talk(moshi({"layers": layers}), 2), tmp_path / "talk")


def test_a_model_that_is_not_patched(tmp_path):
    goes_on(talk(tiny_lm(context=20), 2), tmp_path / "talk")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models(dtype, tmp_path):
    model = tiny_lm(dtype=dtype)
    ttt_cache.patch(model, layers=[0, 1], recent=6, chunk=4)
    goes_on(talk(model, 2), tmp_path / "talk")


def with_lora(model) -> None:
    replace_all_linear_with_lora(model, rank=2, scaling=2.0)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("swap", [with_lora, replace_linear_with_qlinear])
def test_other_projections(swap, tmp_path):
    model = tiny_lm()
    swap(model)
    ttt_cache.patch(model, layers=[0, 2], recent=6, chunk=4)
    goes_on(talk(model, 2), tmp_path / "talk")


def test_speech_to_text(tmp_path):
    goes_on(talk(moshi(dep_q=0), 2), tmp_path / "talk")


@pytest.mark.parametrize("where", ["sum", "cross"])
def test_conditions_and_guidance(where, tmp_path):
    model, told = conditioned(where, MOODS * 2)
    goes_on(talk(model, 2, cfg_coef=2.0, condition_tensors=told), tmp_path / "talk")


def test_guidance_that_is_masked(tmp_path):
    gen = talk(moshi(), 2, cfg_coef=2.0, cfg_is_masked_until=[20, 30])
    goes_on(gen, tmp_path / "talk")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("steps", [0, 1])
def test_a_conversation_that_has_hardly_begun(batch, steps, tmp_path):
    """Before the first step there are no keys of the conditions yet: they are part of a session."""
    model, told = conditioned("cross", ["calm", "glad", "glad"][:batch])
    gen = talk(model, batch, condition_tensors=told)
    codes = frames(model, 20, batch)
    say(gen, codes[:, :, :steps])
    size = ttt_cache.save_session(gen, tmp_path / "talk").stat().st_size
    expected = say(gen, codes[:, :, steps:])
    assert ttt_cache.save_session(gen, tmp_path / "later").stat().st_size == size
    for fresh in (False, True):  # what ran before has them, what begins has not
        if fresh:
            begin_anew(gen, batch=batch)
        ttt_cache.load_session(gen, tmp_path / "talk")
        told = model.transformer.layers[0].cross_attention._streaming_state
        assert not told.k_cross.requires_grad
        assert same(say(gen, codes[:, :, steps:]), expected)


@pytest.mark.parametrize("in_sync", [True, False])
def test_masks_and_resets(in_sync, tmp_path):
    """Rows in different phases, one of them idle while the session is saved."""
    gen = talk(moshi({"layers": [0, 2], "sinks": 2}), 3, support_out_of_sync=not in_sync)
    codes = frames(gen.lm_model, 40, 3)
    say(gen, codes[:, :, :9])
    gen.set_exec_mask(torch.tensor([True, False, True]))
    say(gen, codes[:, :, 9:17])
    gen.reset_streaming(torch.tensor([False, False, True]))
    gen.set_exec_mask(torch.tensor([False, True, True]))
    say(gen, codes[:, :, 17:18])
    ttt_cache.save_session(gen, tmp_path / "talk")
    saved = remembered(gen)

    def rest() -> list:
        said = say(gen, codes[:, :, 18:25])
        gen.set_exec_mask(torch.tensor([True, True, True]))
        return said + say(gen, codes[:, :, 25:])

    expected = rest()
    ttt_cache.load_session(gen, tmp_path / "talk")
    assert remembered(gen) == saved
    assert same(rest(), expected)


@functools.cache
def any_model():
    return moshi({"layers": [0], "sinks": 1}, num_layers=2)


@given(data=st.data())
def test_interrupted_anywhere_and_as_often(data):
    """Sampling, with masks and resets: as if nobody had stopped."""
    length, rows = 24, st.lists(st.booleans(), min_size=3, max_size=3).map(torch.tensor)
    places = st.integers(0, length - 1)
    masks = data.draw(st.dictionaries(places, rows, max_size=4), label="masks")
    resets = data.draw(st.dictionaries(places, rows, max_size=2), label="resets")
    breaks = data.draw(st.sets(places, min_size=1, max_size=3), label="breaks")
    gen = talk(any_model(), 3, support_out_of_sync=data.draw(st.booleans()))
    codes = frames(gen.lm_model, length, 3)

    def talked(breaks: set[int]) -> tuple[list, dict]:
        begin_anew(gen, batch=3)
        torch.manual_seed(4)
        said = []
        for step in range(length):
            if step in resets:
                gen.reset_streaming(resets[step])
            if step in masks:
                gen.set_exec_mask(masks[step])
            if step in breaks:
                with TemporaryDirectory() as folder:
                    path = ttt_cache.save_session(gen, Path(folder, "talk"))
                    torch.manual_seed(step)
                    begin_anew(gen, batch=3)
                    ttt_cache.load_session(gen, path)
            said.append(gen.step(codes[:, :, step : step + 1]))
        return said, remembered(gen)

    (expected, at_end), (said, end) = talked(set()), talked(breaks)
    assert same(said, expected)
    assert end == at_end


@pytest.mark.parametrize("patched", [False, True])
def test_with_mimi(patched, tmp_path):
    """From sound to sound: Mimi's convolutions and rings are part of the conversation."""
    mimi, gen = copy.deepcopy(tiny_mimi()), talk(moshi({"layers": [1, 2]}), 2)
    if patched:
        ttt_cache.patch(mimi.encoder_transformer, layers=[1], recent=3, chunk=2)
    mimi.streaming_forever(2)
    sound = torch.randn(2, 1, 30 * FRAME, generator=torch.Generator().manual_seed(3)) * 0.3

    def hear(start: int, stop: int) -> list:
        said = []
        for number in range(start, stop):
            tokens = gen.step(mimi.encode(sound[..., number * FRAME : (number + 1) * FRAME]))
            said.append(None if tokens is None else mimi.decode(tokens[:, 1:]))
        return said

    with torch.no_grad():
        hear(0, 14)
        ttt_cache.save_session(gen, tmp_path / "talk", mimi=mimi)
        saved, expected = remembered(gen, mimi), hear(14, 30)
        ttt_cache.load_session(gen, tmp_path / "talk", mimi=mimi)
        assert remembered(gen, mimi) == saved
        assert same(hear(14, 30), expected)
        begin_anew(gen, mimi, batch=2)
        ttt_cache.load_session(gen, tmp_path / "talk", mimi=mimi)
        assert same(hear(14, 30), expected)
        ttt_cache.save_session(gen, tmp_path / "one", mimi=mimi, row=1)
        row = remembered(gen, mimi)
        hear(0, 5)
        ttt_cache.load_session(gen, tmp_path / "one", mimi=mimi, row=1)
        ttt_cache.save_session(gen, tmp_path / "again", mimi=mimi, row=1)
        assert row != remembered(gen, mimi)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "again").read_bytes()


def test_restored_in_place(tmp_path):
    """What a CUDA graph has captured is what is written to."""
    gen = talk(moshi({"layers": [0, 2]}), 2)
    codes = frames(gen.lm_model, 12, 2)
    say(gen, codes)
    ttt_cache.save_session(gen, tmp_path / "talk")
    say(gen, codes)
    before = places(gen)
    ttt_cache.load_session(gen, tmp_path / "talk")
    ttt_cache.load_session(gen, tmp_path / "talk", row=[1, 0])
    assert places(gen) == before


def test_a_state_that_was_made_under_inference_mode(tmp_path):
    gen = talk(moshi(), 2)
    codes = frames(gen.lm_model, 25, 2)
    with torch.inference_mode():
        say(gen, codes[:, :, :20])
    ttt_cache.save_session(gen, tmp_path / "talk")
    with torch.inference_mode():
        expected = say(gen, codes[:, :, 20:])
    ttt_cache.load_session(gen, tmp_path / "talk")
    with torch.inference_mode():
        assert same(say(gen, codes[:, :, 20:]), expected)


def test_another_process_goes_on(tmp_path):
    gen = talk(moshi({"layers": [0, 2]}), 2)
    codes = frames(gen.lm_model, BEFORE + AFTER, 2)
    say(gen, codes[:, :, :BEFORE])
    ttt_cache.save_session(gen, tmp_path / "talk")
    expected = say(gen, codes[:, :, BEFORE:])
    script = Path(__file__).with_name("session_process.py")
    command = [sys.executable, str(script), "go-on", str(tmp_path / "talk"), str(BEFORE)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
    said = [torch.tensor(tokens) for tokens in json.loads(done.stdout)]
    assert len(said) == AFTER
    assert same(said, expected)


def test_the_size_of_a_file_does_not_depend_on_the_length_of_the_conversation(tmp_path):
    gen = talk(moshi({"layers": [0, 2]}), 2)
    sizes = set()
    for steps in [0, 1, 9, 90, 200]:
        say(gen, frames(gen.lm_model, steps, 2))
        for row in (None, 1):
            path = ttt_cache.save_session(gen, tmp_path / "talk", row=row)
            sizes.add((row, path.stat().st_size))
    assert len(sizes) == 2


def test_the_same_state_makes_the_same_file(tmp_path):
    gen = talk(moshi(), 2)
    say(gen, frames(gen.lm_model, 20, 2))
    one, two = (ttt_cache.save_session(gen, tmp_path / name) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert one.stat().st_mode & 0o777 == 0o600  # of what was said, for its owner alone
