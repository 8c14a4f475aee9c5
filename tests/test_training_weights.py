"""The weights that a run leaves: they load where Moshi does, and other runs go on from them."""

from __future__ import annotations

import pytest
import torch
from data_support import FACTS
from models import assert_near, random_codes, temporal
from training_support import (
    FILES,
    FULL,
    LORA,
    base,
    figures,
    make,
    small_and_alone,  # noqa: F401
    use_tiny_mimi,
)

import ttt_cache
from ttt_cache.training.engine import Run


@pytest.fixture(scope="module")
def tuned(folder) -> Run:
    """Trained to the third stage, with LoRA and a teacher."""
    with pytest.MonkeyPatch.context() as patch:
        use_tiny_mimi(patch)
        stages = [{"train": "distill"}, {"train": "compressor"}, {"train": "layers"}]
        cache = {"distillation_weight": 0.5}
        run = make(folder, "tuned", *stages, cache=cache, **LORA, ckpt_freq=1)
        run.train()
        return run


def test_new_lora_changes_nothing(folder):
    codes = random_codes(base(folder).get_moshi(dtype=torch.float32), 40)
    plain, lora = make(folder, "plain").lm, make(folder, "lora", **LORA).lm
    assert torch.equal(temporal(lora, codes), temporal(plain, codes))


def test_lora_and_adapter_load_where_moshi_does(folder, tuned):
    out = folder / "tuned"
    paths = {"lora_path": out / "lora.safetensors", "config_path": out / "config.json"}
    lm = base(folder, **paths).get_moshi(dtype=torch.float32)
    codes = random_codes(lm, 40)
    without = temporal(lm, codes)
    ttt_cache.load_adapter(lm, out / "adapter")
    assert torch.equal(temporal(lm, codes), temporal(tuned.lm, codes))
    untouched = temporal(base(folder).get_moshi(dtype=torch.float32), codes)
    assert not torch.allclose(without, untouched, atol=1e-4)  # LoRA by itself does something


@pytest.mark.parametrize("changes", [FULL, LORA | {"save_adapters": False}], ids=["full", "fused"])
def test_whole_weights_load_where_moshi_does(folder, changes):
    name = "whole " + next(iter(changes))
    run = make(folder, name, {"train": "layers"}, **changes)
    seen = {}

    def answer():
        seen["trained"] = temporal(run.lm, codes)

    codes = random_codes(run.lm, 40)
    finish = run._finish
    run._finish = lambda: (answer(), finish())
    run.train()
    out = folder / name
    paths = {"moshi_path": out / "model.safetensors", "config_path": out / "config.json"}
    lm = base(folder, **paths).get_moshi(dtype=torch.float32)
    ttt_cache.load_adapter(lm, out / "adapter")
    assert_near(temporal(lm, codes), seen["trained"])


@pytest.mark.parametrize("changes", [FULL, LORA | {"save_adapters": False}], ids=["full", "fused"])
def test_a_run_goes_on_from_the_lora_of_another(folder, tuned, changes):
    """Whole weights have that LoRA in them, and their config says nothing of it."""
    before, name = folder / "tuned", "from lora " + next(iter(changes))
    files = {n: str(folder / "model" / file) for n, file in FILES.items()}
    files |= {"config_path": str(before / "config.json")}
    lora = {"lora_path": str(before / "lora.safetensors")}
    cache = {"adapter": str(before / "adapter"), "patch": {}}

    def run(paths: dict[str, str], **changes) -> Run:
        return make(folder, name, {"train": "layers"}, cache=cache, moshi_paths=paths, **changes)

    with pytest.raises(ValueError, match="lora_path must be given"):
        run(files, **changes)
    with pytest.raises(ValueError, match="save_adapters must be false"):
        run(files | lora, **LORA)
    second = run(files | lora, **changes)
    codes = random_codes(second.lm, 40)
    if changes == FULL:
        assert_near(temporal(second.lm, codes), temporal(tuned.lm, codes))
    second.train()
    out = folder / name
    assert "lora" not in (out / "config.json").read_text()
    paths = {"moshi_path": out / "model.safetensors", "config_path": out / "config.json"}
    lm = base(folder, **paths).get_moshi(dtype=torch.float32)
    ttt_cache.load_adapter(lm, out / "adapter")
    assert_near(temporal(lm, codes), temporal(second.lm, codes))


def test_a_teacher_adds_its_divergence(folder, tuned):
    found = [record for record in figures(folder, "tuned") if record["stage"] != "distill"]
    assert len(found) == 4 and all(record["kl"] > 1e-4 for record in found)
    for record in found:
        parts = record["text_loss"] + record["audio_loss"] + 0.5 * record["kl"]
        assert record["loss"] == pytest.approx(parts)


def test_stages_leave_no_optimizer_behind(folder, tuned):
    assert not tuned.accelerator._optimizers and not tuned.accelerator._models


def test_facts_of_the_model_are_those_of_its_data(tuned):
    assert tuned.facts == FACTS
