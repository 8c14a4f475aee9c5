"""Whether a session belongs to the model, the adapter and the settings that it is to go on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moshi.models.compression import MimiModel
from moshi.models.lm import LMGen
from torch import nn

from . import fingerprint
from .patched import PatchedAttention
from .targets import attention_of

Identity = dict[str, Any]
# Settings that change nothing in a running conversation.
NOT_RUNNING = ("layers", "preset", "bptt")


def identity_of(gen: LMGen, mimi: MimiModel | None) -> Identity:
    """What must be the same, as plain JSON values, in the order in which it is compared."""
    lm = gen.lm_model
    attention = attention_of(lm.transformer, 0)
    shapes = {
        "class": type(lm).__name__,
        "codebooks": lm.num_codebooks,
        "dep_q": lm.dep_q,
        "card": lm.card,
        "text_card": lm.text_card,
        "delays": list(lm.delays),
        "dim": lm.dim,
        "layers": len(lm.transformer.layers),
        "heads": attention.num_heads,
        "context": attention.context,
        "dtype": str(lm.dtype).removeprefix("torch."),
    }
    # Guidance gives every conversation a second row in the language model.
    found = {"guidance": gen.cfg_coef != 1.0, "model": shapes | _described(lm), "mimi": None}
    if mimi is not None:
        rates = {"sample_rate": mimi.sample_rate, "frame_rate": mimi.frame_rate}
        found["mimi"] = rates | {"codebooks": mimi.num_codebooks} | _described(mimi)
    return found


def _described(root: nn.Module) -> Identity:
    patched = {
        name: module.ttt_cache.config.to_json()
        for name, module in root.named_modules()
        if isinstance(module, PatchedAttention)
    }
    return {
        "patched": list(patched),
        "settings": {
            name: {key: value for key, value in config.items() if key not in NOT_RUNNING}
            for name, config in patched.items()
        },
        "structure": fingerprint.structure(root),
        "weights": fingerprint.weights(root),
        "adapter": fingerprint.weights(root, adapter=True) if patched else None,
    }


def check_same(path: Path, saved: Identity, here: Identity) -> None:
    """Refuse a session of something else.

    Raises:
        ValueError: naming the first that differs, what the session has and what is here.
    """
    if (saved.get("mimi") is None) != (here["mimi"] is None):
        held, given = ("no", "give none") if saved.get("mimi") is None else ("a", "give mimi too")
        raise ValueError(f"{path} holds {held} Mimi: {given}")
    _check_same(path, "", saved, here)


def _check_same(path: Path, name: str, saved: Any, here: Any) -> None:
    if isinstance(saved, dict) and isinstance(here, dict):
        for key in [*here, *(saved.keys() - here.keys())]:
            _check_same(path, f"{name}.{key}" if name else key, saved.get(key), here.get(key))
    elif saved != here and name.endswith("structure"):
        raise ValueError(
            f"{path}: {name}: the session's model is built otherwise than this one: a module has "
            "another class, dtype or attribute (settings set by hand and another moshi count too)"
        )
    elif saved != here:
        raise ValueError(f"{path}: {name}: the session was saved with {saved}, here it is {here}")
