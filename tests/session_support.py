"""Conversations for the tests of sessions, and all that Moshi's states hold, found afresh."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SMALL, random_codes, stir, tiny_lm
from moshi.conditioners import ConditionAttributes
from moshi.models.lm import LMGen, LMModel
from moshi.models.loaders import get_condition_fuser, get_conditioner_provider
from moshi.modules.streaming import StreamingModule
from torch import Tensor, nn

import ttt_cache
from ttt_cache.ready import Ready

Said = list[Tensor | None]
SETTINGS = {"layers": [0, 2]}


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch) -> None:
    """Hundreds of sessions are written here; `session_process.py` writes them for good."""
    monkeypatch.setattr("ttt_cache.files.os.fsync", lambda _: None)


def moshi(settings: dict[str, Any] | None = None, **changes: Any) -> LMModel:
    """A tiny Moshi with a cache of random weights in some layers."""
    model = tiny_lm(**changes)
    ttt_cache.patch(model, **(SMALL | (settings or {})))
    if ttt_cache.adapter_parameters(model):
        stir(model)
    return model


def conditioned(where: str, moods: list[str], **changes: Any) -> tuple[LMModel, dict]:
    """A tiny Moshi that is told a mood, by `sum` or `cross`, and the moods of its rows."""
    config = {
        "conditioners": {"mood": {"type": "lut", "lut": {
            "n_bins": 4, "dim": 8, "tokenizer": "noop", "possible_values": ["calm", "glad"]}}},
        "fuser": {where: ["mood"]},
    }  # fmt: skip
    torch.manual_seed(5)
    provider = get_conditioner_provider(32, "cpu", config)
    fuser = get_condition_fuser(config)
    model = moshi(
        condition_provider=provider, fuser=fuser, cross_attention=where == "cross", **changes
    )
    told = [ConditionAttributes(text={"mood": mood}, tensor={}) for mood in moods]
    return model, provider.prepare_and_provide(told)


def talk(model: LMModel, batch: int, **options: Any) -> LMGen:
    """A batch of conversations that begin; whatever the model streamed before has ended."""
    model._stop_streaming()
    gen = LMGen(model, **options)
    gen.streaming_forever(batch)
    return gen


def begin_anew(*modules: StreamingModule, batch: int) -> None:
    """The same batch, empty."""
    for module in modules:
        if isinstance(module, LMGen):
            module.lm_model._stop_streaming()
        module._stop_streaming()
        module.streaming_forever(batch)


def frames(model: LMModel, length: int, batch: int, seed: int = 1) -> Tensor:
    """What users say: codes `[batch, K, length]`."""
    return random_codes(model, length, batch, seed)[:, model.dep_q + 1 :]


def say(gen: LMGen, codes: Tensor) -> Said:
    return [gen.step(codes[:, :, t : t + 1]) for t in range(codes.shape[2])]


def same(one: Said, other: Said) -> bool:
    """Whether two batches were answered the same, token by token."""
    return len(one) == len(other) and all(
        (a is None) is (b is None) and (a is None or b is None or torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


def remembered(*roots: nn.Module) -> dict[str, Any]:
    """Every tensor and integer that hangs on a streaming state, as bytes; random generators too.

    Found through the attributes of whatever is there: a field that sessions forget is seen. What is
    derived of a state and no part of it is not.
    """
    found = {"generator": torch.get_rng_state().numpy().tobytes()}
    for number, root in enumerate(roots):
        for name, module in root.named_modules(prefix=str(number)):
            state = getattr(module, "_streaming_state", None)
            for path, value in _values(state, name):
                found[path] = value
    return found


def _values(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        whole = value.detach().contiguous()
        yield path, (tuple(value.shape), whole.view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Ready):
        return
    elif isinstance(value, int):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _values(item, f"{path}.{key}")
    elif hasattr(value, "__dict__") and not callable(value):
        yield from _values(vars(value), path)


def places(*roots: nn.Module) -> dict[str, int]:
    """Where every tensor of the states lies in memory."""
    found = {}
    for number, root in enumerate(roots):
        for name, module in root.named_modules(prefix=str(number)):
            for path, tensor in _tensors(getattr(module, "_streaming_state", None), name):
                found[path] = tensor.data_ptr()
    return found


def _tensors(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(item, f"{path}.{key}")
    elif hasattr(value, "__dict__") and not callable(value):
        yield from _tensors(vars(value), path)


def saved(folder: Path) -> Path:
    """A session of two conversations of 20 frames."""
    gen = talk(moshi(SETTINGS), 2)
    say(gen, frames(gen.lm_model, 20, 2))
    return ttt_cache.save_session(gen, folder / "talk")


def begun() -> LMGen:
    """Two other conversations, with the same model."""
    gen = talk(moshi(SETTINGS), 2)
    say(gen, frames(gen.lm_model, 9, 2, seed=4))
    return gen


def refused(gen: LMGen, file: Path, error: type[Exception], match: str, **given) -> None:
    """Assert that a session is, and that nothing has changed."""
    before = remembered(gen)
    with pytest.raises(error, match=match):
        ttt_cache.load_session(gen, file, **given)
    assert remembered(gen) == before
