"""The YAML of a training run: moshi-finetune's keys, and one block `ttt_cache:` beside them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    ValidationInfo,
    field_validator,
)

from ttt_cache.config import CacheConfig

FRAME_RATE = 12.5  # Mimi's frames per second
STAGES = ("distill", "compressor", "layers", "everything")  # each trains what those before it do


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes `true` for 1; people who write it mean something else."""
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError("must not be true or false")
        return value


class Data(_Block):
    """jsonl manifests: see `ttt_cache.training.data`."""

    train_data: str = Field(min_length=1)
    eval_data: str = ""
    shuffle: bool = False


class Paths(_Block):
    """What `moshi.models.loaders.CheckpointInfo.from_hf_repo` takes."""

    hf_repo_id: str = "kyutai/moshiko-pytorch-bf16"
    mimi_path: str | None = None
    moshi_path: str | None = None
    tokenizer_path: str | None = None
    config_path: str | None = None
    lora_path: str | None = None


class Lora(_Block):
    enable: bool = False
    rank: int = Field(default=64, ge=1)
    scaling: float = Field(default=2.0, gt=0)
    ft_embed: bool = False


class Optim(_Block):
    lr: float = Field(default=1e-4, ge=0)
    weight_decay: float = Field(default=0.1, ge=0)
    pct_start: float = Field(default=0.05, ge=0, le=1)


class Wandb(_Block):
    project: str | None = None
    offline: bool = False
    key: str | None = None
    run_name: str | None = None


class Stage(_Block):
    """One stage of training.

    Attributes:
        train: `distill` (the memory, layer by layer), `compressor` (the memory, by the model's
            loss), `layers` (also the patched layers), `everything`.
        steps: optimizer steps; `max_steps` if not given.
        frames: lengths of segments, a curriculum: each gets the same share of the steps.
            `duration_sec` if not given.
        lr: highest learning rate; `optim.lr` if not given.
    """

    train: Literal["distill", "compressor", "layers", "everything"]
    steps: int | None = Field(default=None, ge=1)
    frames: list[StrictInt] | None = Field(default=None, min_length=1)
    lr: float | None = Field(default=None, ge=0)

    @field_validator("frames")
    @classmethod
    def _positive(cls, frames: list[int] | None) -> list[int] | None:
        if frames is not None and min(frames) < 1:
            raise ValueError(f"lengths must be at least 1 frame, got {min(frames)}")
        return frames


class Cache(_Block):
    """The block `ttt_cache:`.

    Attributes:
        patch: settings of `ttt_cache.patch`.
        stages: what is trained, in this order.
        adapter: a folder or hub id of an adapter to go on from.
        session_sec: recordings are concatenated in file order to sessions of at least that length;
            0 leaves every recording by itself.
        codes_dir: where the tokenised recordings are kept; `run_dir/codes` if not given.
        distillation_weight: of the divergence from the full-context model's predictions.
    """

    patch: dict[str, Any] = Field(default_factory=dict)
    stages: list[Stage] = Field(default_factory=lambda: [Stage(train="compressor")], min_length=1)
    adapter: str | None = None
    session_sec: float = Field(default=0.0, ge=0)
    codes_dir: str | None = None
    distillation_weight: float = Field(default=0.0, ge=0)

    @field_validator("patch")
    @classmethod
    def _patch(cls, fields: dict[str, Any]) -> dict[str, Any]:
        try:
            CacheConfig.from_fields(fields)
        except TypeError as error:  # pydantic reports ValueErrors only
            raise ValueError(str(error)) from error
        return fields

    @field_validator("stages")
    @classmethod
    def _order(cls, stages: list[Stage]) -> list[Stage]:
        order = [STAGES.index(stage.train) for stage in stages]
        if order != sorted(order):
            raise ValueError(f"must widen in the order {', '.join(STAGES)}")
        return stages


class Settings(_Block):
    """A training run. Keys and defaults are moshi-finetune's where it has them."""

    data: Data
    run_dir: str = Field(min_length=1)
    moshi_paths: Paths = Paths()
    first_codebook_weight_multiplier: float = Field(default=1.0, ge=0)
    text_padding_weight: float = Field(default=0.5, ge=0)
    optim: Optim = Optim()
    seed: int = Field(default=0, ge=0, lt=2**63)  # torch takes 64 bits
    num_microbatches: int = Field(default=1, ge=1)
    duration_sec: float = Field(default=10.0, gt=0)
    batch_size: int = Field(default=1, ge=1)
    max_norm: float = Field(default=1.0, gt=0, allow_inf_nan=True)
    max_steps: int = Field(default=100, ge=1)
    log_freq: int = Field(default=1, ge=1)
    ckpt_freq: int = Field(default=0, ge=0)
    do_ckpt: bool = True
    num_ckpt_keep: int | None = Field(default=3, ge=1)
    save_adapters: bool = True
    eval_freq: int = Field(default=0, ge=0)
    do_eval: bool = False
    gradient_checkpointing: bool = True
    wandb: Wandb = Wandb()
    lora: Lora = Lora()
    full_finetuning: bool = False
    param_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    overwrite_run_dir: bool = False
    ttt_cache: Cache = Cache()

    @property
    def tunes_moshi(self) -> bool:
        """Whether weights of Moshi itself are trained, by LoRA or in full."""
        return self.ttt_cache.stages[-1].train in ("layers", "everything")

    @property
    def keeps_lora(self) -> bool:
        """Whether a LoRA is trained that will be kept apart from the weights it belongs to."""
        return self.tunes_moshi and self.lora.enable and self.save_adapters

    def steps_of(self, stage: Stage) -> int:
        return stage.steps or self.max_steps

    def lengths_of(self, stage: Stage) -> list[int]:
        """Lengths of the segments of a stage, in frames, each for the same share of its steps."""
        return stage.frames or [max(1, round(self.duration_sec * FRAME_RATE))]

    def frames_of(self, stage: Stage, step: int) -> int:
        """Length of the segments in a step of a stage, counted from 0."""
        lengths = self.lengths_of(stage)
        return lengths[step * len(lengths) // self.steps_of(stage)]
