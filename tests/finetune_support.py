"""A stand-in for moshi-finetune, with the code of docs/finetune.md in it.

`build`, `shard` and `train` do what moshi-finetune (github.com/kyutai-labs/moshi-finetune) does in
`get_fsdp_model` and `train.py`, in that order, on the CPU with gloo: FSDP where there are several
processes, none where there is one.
"""

from __future__ import annotations

import functools
import json
import re
import types
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import SMALL, TINY, tiny_lm
from moshi.models.lm import LMModel
from moshi.modules.lora import LoRALinear, replace_all_linear_with_lora
from moshi.modules.transformer import StreamingTransformerLayer
from safetensors.torch import save_file
from torch.distributed.fsdp import FullyShardedDataParallel, _init_utils, wrap

import ttt_cache

PAGE = Path(__file__).parents[1] / "docs" / "finetune.md"
STEPS, LENGTH, ROWS = 3, 40, 4


class Run(NamedTuple):
    """A run of moshi-finetune: precision, and LoRA or all weights."""

    dtype: torch.dtype
    lora: bool

    @property
    def name(self) -> str:
        return f"{str(self.dtype).split('.')[1]}-{'lora' if self.lora else 'full'}"


RUNS = [Run(torch.float32, True), Run(torch.bfloat16, True), Run(torch.bfloat16, False)]


def recipe(adapter: Path | None = None) -> Any:
    """The module that the page tells a user to add, with settings for a tiny model."""
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    module = types.ModuleType("ttt")
    exec(compile(code, str(PAGE), "exec"), vars(module))
    vars(module).update(SETTINGS={**SMALL, "layers": [0, -1]}, ADAPTER=adapter)
    return module


def build(run: Run) -> LMModel:
    """On the meta device; weights and LoRA on rank 0 only; then everything but LoRA is frozen."""
    with torch.device("meta"):
        model = LMModel(**TINY, gradient_checkpointing=True, device="meta", dtype=run.dtype)
        if run.lora:
            replace_all_linear_with_lora(model, 2, 2.0)
    if dist.get_rank() == 0:
        base = {name: t.to(run.dtype) for name, t in tiny_lm().state_dict().items()}
        model.load_state_dict(base, strict=False, assign=True)
        generator = torch.Generator().manual_seed(5)
        for lora in (m for m in model.modules() if isinstance(m, LoRALinear)):
            lora.lora_A.to_empty(device="cpu").weight.data.normal_(generator=generator)
            lora.lora_B.to_empty(device="cpu").weight.data.zero_()
        assert all(p.dtype == run.dtype and not p.is_meta for p in model.parameters())
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora" in name or not run.lora
    return model


def fsdp_policy(lora: bool) -> Any:
    """Each layer is a unit; with LoRA so is everything that is trained throughout."""
    by_layer = functools.partial(
        wrap.transformer_auto_wrap_policy, transformer_layer_cls={StreamingTransformerLayer}
    )
    by_grad = functools.partial(
        wrap.lambda_auto_wrap_policy,
        lambda_fn=lambda module: all(p.requires_grad for p in module.parameters()),
    )
    return functools.partial(wrap._or_policy, policies=[by_grad, by_layer]) if lora else by_layer


def shard(model: LMModel, run: Run, policy: Any) -> FullyShardedDataParallel:
    def fill(module: torch.nn.Module) -> None:
        module.to_empty(device="cpu", recurse=False)
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(run.dtype)

    # FSDP broadcasts rank 0's weights from GPUs only, for NCCL's sake; gloo can from the CPU.
    _init_utils._check_module_states_for_sync_module_states = lambda states: None
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=policy,
        limit_all_gathers=True,
        device_id=torch.device("cpu"),
        sync_module_states=True,
        param_init_fn=fill if dist.get_rank() else None,
        use_orig_params=True,
    )


class MixedPrecision:
    """`param_dtype` for forward and backward, float32 copies for the optimizer."""

    def __init__(self, parameters: list[torch.nn.Parameter], dtype: torch.dtype) -> None:
        self.dtype, self.trained = dtype, [p for p in parameters if p.requires_grad]
        self.copies = [p.detach().clone().float() for p in self.trained]
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)

    def step(self, update: Any) -> None:
        narrow = [p.data for p in self.trained]
        for parameter, copy in zip(self.trained, self.copies, strict=True):
            if parameter.grad is not None:
                parameter.data, parameter.grad = copy, parameter.grad.float()
        update()
        for parameter, data in zip(self.trained, narrow, strict=True):
            if parameter.grad is not None:
                data.copy_(parameter.data)
                parameter.data, parameter.grad = data, parameter.grad.to(self.dtype)


def loss_of(model: LMModel | FullyShardedDataParallel, codes: torch.Tensor) -> torch.Tensor:
    out = model(codes=codes)
    heard, text = out.mask, out.text_mask
    loss = F.cross_entropy(out.text_logits[text].float(), codes[:, :1][text])
    return loss + F.cross_entropy(out.logits[heard].float(), codes[:, 1 : 1 + TINY["dep_q"]][heard])


def all_rows(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    shape = (ROWS, 1 + TINY["n_q"], LENGTH)
    return torch.randint(0, TINY["card"], shape, generator=generator)


def own_rows(step: int) -> torch.Tensor:
    return all_rows(step).chunk(dist.get_world_size())[dist.get_rank()]


def train(model: LMModel | FullyShardedDataParallel, run: Run, ttt: Any) -> list[float]:
    """Losses over all rows, before each step and after the last one."""
    optimizer = torch.optim.AdamW(ttt.param_groups(model), lr=1e-2, betas=(0.9, 0.95))
    precision = MixedPrecision(ttt.base_parameters(model), run.dtype)
    model.train()
    clip = getattr(model, "clip_grad_norm_", None) or functools.partial(
        torch.nn.utils.clip_grad_norm_, list(model.parameters())
    )

    def update() -> None:
        clip(1.0)
        optimizer.step()

    losses = []
    for step in range(STEPS + 1):
        optimizer.zero_grad()
        loss = loss_of(model, own_rows(step))
        loss.backward()
        if step < STEPS:
            precision.step(update)
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(mean.item())
    return losses


def experiment(run: Run, folder: Path) -> None:
    """Train and leave in `folder`: losses, adapters, the whole state, logits and what FSDP did."""
    torch.manual_seed(11)
    ttt = recipe()
    model = build(run)
    ttt.patch(model)
    if dist.get_rank() == 0:
        ttt_cache.save_adapter(model, folder / "start")
    if dist.get_world_size() > 1:
        model = shard(model, run, ttt.wrap_policy(model, fsdp_policy(run.lora)))
    facts: dict[str, Any] = {"losses": train(model, run, ttt)}
    ttt.save(model, folder / "end")
    with torch.no_grad():
        logits = model.eval()(codes=own_rows(0)).text_logits
    facts["units"] = units(model)
    facts["dtypes"] = {n: str(p.dtype) for n, p in model.named_parameters()}
    whole = nullcontext()
    if isinstance(model, FullyShardedDataParallel):
        whole = model.summon_full_params(model, writeback=False)
    with whole:
        states = {n: t.detach().clone() for n, t in ttt.without_adapter(model.state_dict()).items()}
    if dist.get_rank() == 0:
        save_file(states, folder / "base.safetensors")
        save_file({"logits": logits.contiguous()}, folder / "logits.safetensors")
        (folder / "facts.json").write_text(json.dumps(facts))
    go_on(run, folder)


def units(model: LMModel | FullyShardedDataParallel) -> list[tuple[str, str]]:
    """What FSDP made units of, by class, and the dtype of their weights."""
    return [
        (type(unit.module).__name__, str(unit._handle.flat_param.dtype))
        for unit in FullyShardedDataParallel.fsdp_modules(model)
        if unit._handle is not None
    ]


def go_on(run: Run, folder: Path) -> None:
    """A second run that starts with the adapter of the first."""
    ttt = recipe(folder / "end")
    model = build(run)
    ttt.patch(model)
    if dist.get_world_size() > 1:
        model = shard(model, run, ttt.wrap_policy(model, fsdp_policy(run.lora)))
    with torch.no_grad():
        loss_of(model, own_rows(0))
    ttt.save(model, folder / "again")


def work(rank: int, world: int, folder: Path) -> None:
    """One process: all runs, one after the other."""
    torch.set_num_threads(1)
    store = folder / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for run in RUNS:
        (folder / run.name).mkdir(exist_ok=True)
        experiment(run, folder / run.name)
    dist.destroy_process_group()
