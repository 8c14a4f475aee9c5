"""Adapters of an evaluation: trained once, by the recipe, and kept whole or not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from evaluation_support import CONTEXT, SETTINGS, recipe, tiny
from models import fingerprint
from torch import Tensor

import ttt_cache
from ttt_cache.evaluation import adapters
from ttt_cache.evaluation.adapters import adapter_for
from ttt_cache.evaluation.hashes import adapter_hash, base_hash
from ttt_cache.evaluation.recipe import DEFAULT, HYBRID, SWEEP, Course
from ttt_cache.evaluation.source import TestbedSource
from ttt_cache.evaluation.tune import learn, tuning

FEW = TestbedSource("few")


def make(lm, folder: Path, *, source=FEW, settings=SETTINGS, steps=None, seed=0) -> Path:
    steps = (steps or recipe()).stretched(CONTEXT)
    return adapter_for(lm, source, settings, steps, folder, seed, progress=False)


def loss_of(lm, handle, codes, steps) -> Tensor:
    (loss,) = tuning(lm, handle, [codes], steps)
    return loss


def weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_it_is_trained_once_and_kept(tmp_path, monkeypatch):
    lm = tiny()
    kept = make(lm, tmp_path)
    history = json.loads((kept / "training.json").read_text())
    assert len(history["tune"]) == 1 and history["distill"].keys() == {"0", "1"}
    assert history["made"]["base"] == base_hash(lm)
    assert history["adapter"] == adapter_hash(kept)
    monkeypatch.setattr(adapters, "_train", None)  # not called again
    assert make(lm, tmp_path) == kept
    with ttt_cache.load_adapter(lm, kept) as handle:
        assert handle.config.recent == SETTINGS["recent"]


def test_training_changes_the_memory_and_nothing_else(tmp_path):
    lm = tiny()
    before, held = fingerprint(lm), {k: t.clone() for k, t in lm.state_dict().items()}
    lm.text_emb.requires_grad_(True)
    untrained, trained = (
        weights(make(lm, tmp_path, steps=recipe(steps, steps))) for steps in (0, 3)
    )
    assert untrained.keys() == trained.keys()
    # Layer-wise and end to end everything that is read learns.
    assert all(not torch.equal(untrained[name], trained[name]) for name in untrained)
    assert fingerprint(lm) == before
    assert all(torch.equal(tensor, held[key]) for key, tensor in lm.state_dict().items())
    assert [n for n, p in lm.named_parameters() if p.requires_grad] == ["text_emb.weight"]


@pytest.mark.parametrize("change", ["source", "settings", "recipe", "seed", "base"])
def test_what_makes_it_names_it(change, tmp_path):
    lm = tiny()
    kept = make(lm, tmp_path, steps=recipe(0, 0))
    others = {
        "source": {"source": TestbedSource("many")},
        "settings": {"settings": {**SETTINGS, "virtual": 4}},
        "recipe": {"steps": recipe(0, 0, audio=0.5)},
        "seed": {"seed": 1},
        "base": {},
    }
    other = tiny(seed=5) if change == "base" else lm
    assert make(other, tmp_path, **{"steps": recipe(0, 0), **others[change]}) != kept


def test_the_same_training_gives_the_same_adapter(tmp_path):
    one, two = (make(tiny(), tmp_path / name) for name in "ab")
    assert one.name == two.name
    assert adapter_hash(one) == adapter_hash(two)
    other = make(tiny(), tmp_path, seed=1)
    assert adapter_hash(one) != adapter_hash(other)
    assert adapter_hash(None) is None


@pytest.mark.parametrize("when", ["learn", "save_adapter"])
def test_training_that_is_killed_leaves_nothing(when, tmp_path, monkeypatch):
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    lm = tiny()
    before = fingerprint(lm)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(adapters, when, killed)
        make(lm, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert fingerprint(lm) == before
    assert make(lm, tmp_path).is_dir()


def test_what_a_killed_training_left_is_removed(tmp_path):
    """Killed as by a power cut: nothing of it tidied up."""
    expected = make(tiny(), tmp_path / "whole")
    stale = tmp_path / f".training-{expected.name}"
    stale.mkdir()
    (stale / "adapter_model.safetensors").write_bytes(b"half")
    (stale / "more").touch()
    other = tmp_path / ".training-of-another"  # which may be going on
    other.mkdir()
    kept = make(tiny(), tmp_path)
    assert kept.name == expected.name and adapter_hash(kept) == adapter_hash(expected)
    assert {path.name for path in kept.iterdir()} == {path.name for path in expected.iterdir()}
    assert not stale.exists() and other.exists()


def test_a_last_stage_that_fails_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    lm, real = tiny(), adapters.lasting
    before, shares = list(lm.state_dict()), iter((1.0, float("nan")))

    def failing(*args):
        for loss in real(*args):
            yield loss * next(shares)

    monkeypatch.setattr(adapters, "lasting", failing)
    steps = replace(recipe(), last=Course(((512, 2, 3),), lr=1e-3))
    with pytest.raises(RuntimeError, match="step 2: the loss is nan"):
        make(lm, tmp_path, steps=steps)
    assert list(lm.state_dict()) == before
    with ttt_cache.patch(lm, **SETTINGS):
        pass


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_damaged_adapter_is_named(name, tmp_path):
    kept = make(tiny(), tmp_path)
    (kept / name).unlink()
    with pytest.raises(ValueError, match=rf"{kept.name} is damaged, it has no {name}; delete it"):
        make(tiny(), tmp_path)


@pytest.mark.parametrize(("longest", "fits"), [(39, False), (40, True), (None, True)])
def test_too_short_recordings_are_refused_before_the_first_step(longest, fits, monkeypatch):
    source = TestbedSource("few")
    monkeypatch.setattr(source, "longest", longest, raising=False)
    steps = replace(recipe(frames=1), tune=Course(((40, 1, 1),), lr=1e-3))
    if fits:
        adapters.require_lessons(source, steps)
        return
    monkeypatch.setattr(adapters, "_train", None)  # never called
    with pytest.raises(ValueError, match=r"sequences of 40 frames .* has 39 frames together"):
        adapter_for(tiny(), source, SETTINGS, steps, Path("nowhere"))


def test_settings_without_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="memory='none' has nothing to train"):
        make(tiny(), tmp_path, settings={"recent": 6, "memory": "none"})
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_patched_base_is_the_same_base(tmp_path):
    lm = tiny()
    with ttt_cache.patch(lm, **SETTINGS):
        patched = base_hash(tiny())
        assert base_hash(lm) == patched
    assert base_hash(tiny(seed=1)) != patched


def test_a_memory_that_is_never_read_is_full_context():
    lm = tiny()
    codes = next(FEW.batches(2, 40, 1, 0))
    with ttt_cache.patch(lm, memory="none", recent=40) as handle:
        assert loss_of(lm, handle, codes, recipe()).item() == pytest.approx(0, abs=1e-6)
    with ttt_cache.patch(lm, memory="none", recent=5) as handle:
        assert loss_of(lm, handle, codes, recipe()).item() > 1e-3


def test_moshis_loss_is_that_of_its_own_forward():
    lm = tiny()
    codes = next(FEW.batches(2, 40, 1, 0))
    steps = recipe(moshi=1.0, text_padding=1.0, audio=0.5)
    with ttt_cache.patch(lm, **SETTINGS) as handle:
        out = lm(codes)
        text, heard = out.text_mask, out.mask
        expected = F.cross_entropy(out.text_logits[text], codes[:, :1][text])
        audio = F.cross_entropy(out.logits[heard], codes[:, 1 : 1 + lm.dep_q][heard])
        loss = loss_of(lm, handle, codes, steps)
    assert loss.item() == pytest.approx((expected + 0.5 * audio).item(), rel=1e-5)


def test_tuning_lowers_the_loss():
    lm = tiny()
    (codes,) = FEW.batches(2, 60, 1, 0)
    steps = recipe(0, 12, moshi=1.0)
    with ttt_cache.patch(lm, **SETTINGS) as handle:
        given = tuning(lm, handle, [codes] * 12, steps)
        losses = learn(lm, handle, steps.tune, given, "tune", progress=False)
    assert losses[-1] < losses[0] - 0.01


def test_a_loss_that_is_no_number_is_named():
    lm = tiny()
    with torch.no_grad():
        lm.text_linear.weight.fill_(torch.nan)
    (codes,) = FEW.batches(1, 30, 1, 0)
    with (
        ttt_cache.patch(lm, **SETTINGS) as handle,
        pytest.raises(RuntimeError, match="step 1: the loss is nan"),
    ):
        steps = recipe(moshi=1.0)
        learn(lm, handle, steps.tune, tuning(lm, handle, [codes], steps), "tune", progress=False)


def test_recipes_scale_and_stretch():
    course = Course(((100, 4, 40), (200, 2, 3)), lr=1e-3)
    assert course.steps == 43
    assert course.scaled(0.1).stages == ((100, 4, 4),)
    assert DEFAULT.scaled(0).steps == 0
    assert DEFAULT.stretched(1024) == DEFAULT
    assert DEFAULT.stretched(3000).tune.stages[-1][0] == 3000
    assert HYBRID.moshi == 1 and not HYBRID.distill.steps and SWEEP.steps
    with pytest.raises(ValueError, match="moshi must be a number in"):
        recipe(moshi=1.5)
