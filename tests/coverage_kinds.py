"""Every kind of Moshi model as `LMGen` runs it, small, with what `LMGen` must be told of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from models import tiny_lm
from moshi.conditioners import ConditionAttributes, TensorCondition
from moshi.models.lm import LMGen, LMModel
from moshi.models.loaders import get_condition_fuser, get_conditioner_provider, get_lora_moshi
from moshi.modules.lora import LoRALinear, replace_all_linear_with_lora
from safetensors.torch import save_file
from torch import Tensor

CONTEXT = 12  # a ring that wraps


class Kind(NamedTuple):
    """A model, and the options of its generation."""

    model: LMModel
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed


def lora(folder: Path, fuse: bool) -> Kind:
    """LoRA weights from a file, through Moshi's own loader."""
    trained = tiny_lm(context=CONTEXT)
    replace_all_linear_with_lora(trained, 2, 2.0)
    generator = torch.Generator().manual_seed(5)
    for part in (m for m in trained.modules() if isinstance(m, LoRALinear)):
        part.lora_B.weight.data.normal_(0, 0.2, generator=generator)
    weights = {n: t for n, t in trained.state_dict().items() if "lora" in n}
    save_file(weights, folder / "lora.safetensors")
    model = get_lora_moshi(
        tiny_lm(context=CONTEXT), folder / "lora.safetensors", lora_rank=2, lora_scaling=2.0,
        dtype=torch.float32, device="cpu", fuse_lora=fuse,
    )  # fmt: skip
    assert any(isinstance(m, LoRALinear) for m in model.modules()) == (not fuse)
    return Kind(model.eval())


def conditioned(fusing: str, guidance: float) -> Kind:
    """A voice that is cross-attended or a mood that is summed; guided by its absence."""
    config: dict[str, Any] = {
        "conditioners": {
            "voice": {"type": "tensor", "tensor": {"dim": 8}},
            "mood": {"type": "lut", "lut": {"n_bins": 4, "dim": 8, "tokenizer": "noop",
                                            "possible_values": ["calm", "glad"]}},
        },
        "fuser": {"sum": ["mood"], "cross": ["voice"], "cross_attention_pos_emb": True},
    }  # fmt: skip
    del config["conditioners"]["mood" if fusing == "cross" else "voice"]
    config["fuser"].pop("sum" if fusing == "cross" else "cross")
    torch.manual_seed(6)
    provider = get_conditioner_provider(32, "cpu", config)
    cross = {"cross_attention": fusing == "cross"}
    fuser = get_condition_fuser(config)
    model = tiny_lm(context=CONTEXT, condition_provider=provider, fuser=fuser, **cross)
    generator = torch.Generator().manual_seed(7)
    given = []
    for row in range(4 if guidance != 1 else 2):
        voice = torch.randn(1, 5, 8, generator=generator)
        mask = torch.ones(1, 5, dtype=torch.bool)
        tensor = {"voice": TensorCondition(voice, mask)} if fusing == "cross" else {}
        text = {} if fusing == "cross" else {"mood": ("calm", "glad")[row % 2]}
        given.append(ConditionAttributes(text=text, tensor=tensor))
    conditions = provider.prepare_and_provide(given)
    return Kind(model, {"cfg_coef": guidance, "condition_tensors": conditions})


KINDS: dict[str, Callable[[Path], Kind]] = {
    "LoRA": lambda folder: lora(folder, fuse=False),
    "LoRA, fused": lambda folder: lora(folder, fuse=True),
    "summed condition": lambda _: conditioned("sum", 1.0),
    "summed condition, guided": lambda _: conditioned("sum", 2.0),
    "crossed condition": lambda _: conditioned("cross", 1.0),
    "crossed condition, guided": lambda _: conditioned("cross", 2.0),
    "speech to text": lambda _: Kind(tiny_lm(context=CONTEXT, dep_q=0)),
    "two text streams": lambda _: Kind(tiny_lm(context=CONTEXT, demux_second_text_stream=True)),
    "bfloat16": lambda _: Kind(tiny_lm(context=CONTEXT).to(torch.bfloat16)),
    "int8": lambda _: Kind(tiny_lm(context=CONTEXT, quantize=True)),
}


class Heard(NamedTuple):
    """What the temporal transformer was given and what it made of it, step by step."""

    inputs: Tensor  # [B, K, T]
    conditions: tuple[Tensor | None, Tensor | None]
    logits: Tensor  # [B, T, text_card]


def listen(model: LMModel, run: Callable[[], Any]) -> Heard:
    """Let something run, and hear every step of the model."""
    inputs, logits, conditions = [], [], []
    forward = model.forward_text

    def forward_text(codes: Tensor, *given: Tensor | None) -> tuple[Tensor, Tensor]:
        out = forward(codes, *given)
        inputs.append(codes.clone())
        logits.append(out[1][:, 0].clone())
        conditions.append(given)
        return out

    model.forward_text = forward_text
    try:
        run()
    finally:
        del model.forward_text
    return Heard(torch.cat(inputs, 2), conditions[0], torch.cat(logits, 1))


def generated(kind: Kind, length: int) -> Heard:
    """Greedy generation for two conversations that hear random codes."""
    model = kind.model
    generator = torch.Generator().manual_seed(8)
    shape = (2, model.n_q - model.dep_q, length)
    codes = torch.randint(0, model.card, shape, generator=generator)
    gen = LMGen(model, use_sampling=False, **kind.options)

    def run() -> None:
        with gen.streaming(2):
            for part in codes.split(1, dim=2):
                gen.step(part)

    return listen(model, run)


@torch.no_grad()
def parallel(model: LMModel, heard: Heard) -> Tensor:
    """The text logits of the parallel form for the same inputs."""
    return model.forward_text(heard.inputs, *heard.conditions)[1][:, 0]
