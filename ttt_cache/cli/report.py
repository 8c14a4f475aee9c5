"""`ttt-cache report`: bytes per conversation, before any weights are downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import refusals
from .options import (
    Chunk,
    Depth,
    Memory,
    Preset,
    Read,
    Recent,
    Sinks,
    Source,
    Virtual,
    Write,
    given,
    number,
    parse_layers,
)
from .presets import list_presets

# Keys of a Moshi config.json that describe files and generation (`CheckpointInfo.from_hf_repo` pops
# them), or parts of the model that do not change the state of the temporal transformer.
NOT_MODEL = ("moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "lora_name")
NOT_MODEL += ("model_type", "lm_gen_config", "tts_config", "stt_config", "model_id")
NOT_STATE = ("conditioners", "fuser", "lora", "lora_rank", "lora_scaling", "quantize")


def report(
    layers: Annotated[
        str, typer.Option(help="Layers to patch: 'all', 25-31, 0,3,5 or -1 (the last one).")
    ] = "all",
    preset: Preset = None,
    recent: Recent = None,
    virtual: Virtual = None,
    chunk: Chunk = None,
    sinks: Sinks = None,
    memory: Memory = None,
    source: Source = None,
    read: Read = None,
    write: Write = None,
    memory_heads: Annotated[int | None, number("Heads of the memory, at least 1.", "4")] = None,
    memory_dim: Annotated[int | None, number("Width of a memory head, at least 1.", "64")] = None,
    hidden_dim: Annotated[
        int | None,
        number("Hidden width of a memory head, at least 1.", "128"),
    ] = None,
    depth: Depth = None,
    batch_size: Annotated[int, number("Conversations that run at once, at least 1.")] = 1,
    config_path: Annotated[
        Path | None,
        typer.Option(
            help="A config.json of another Moshi model, as in its repository on Hugging Face.",
            show_default="Moshi 7B",
            metavar="FILE",
        ),
    ] = None,
    presets: Annotated[
        bool,
        typer.Option(
            "--presets", is_eager=True, callback=list_presets, help="List the presets and exit."
        ),
    ] = False,
) -> None:
    """Print what conversations cost in memory, with and without the patch.

    The sizes (MB, 10^6 bytes) are measured on the streaming state of a Moshi
    in bfloat16 that is laid out but not filled: no weights are downloaded,
    and any machine will do. It takes about ten seconds.

    Example: ttt-cache report --layers 25-31 --recent 100 --batch-size 8

    Another system: ttt-cache report --preset ttt-linear-layer --layers 16-31
    """
    with refusals():
        fields = given(
            layers=parse_layers(layers),
            preset=preset,
            recent=recent,
            virtual=virtual,
            chunk=chunk,
            sinks=sinks,
            memory=memory,
            source=source,
            read=read,
            write=write,
            memory_heads=memory_heads,
            memory_dim=memory_dim,
            hidden_dim=hidden_dim,
            depth=depth,
        )
    lm_kwargs = None if config_path is None else read_config(config_path)
    _print_report(lm_kwargs, fields, batch_size)


def _print_report(
    lm_kwargs: dict[str, Any] | None, fields: dict[str, Any], batch_size: int
) -> None:
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("Loading PyTorch and Moshi"):
        import ttt_cache
        from ttt_cache.checks import whole_number

    with refusals():  # before the model, which takes seconds
        config = ttt_cache.CacheConfig.from_fields(fields)
        whole_number("--batch-size", batch_size, 1)
    with console.status("Laying out the model, without its weights"):
        model = build(lm_kwargs)
        with refusals():
            ttt_cache.patch(model, config=config)
    with refusals():
        ttt_cache.report(model, batch_size=batch_size)


def build(lm_kwargs: dict[str, Any] | None) -> Any:
    """A Moshi on the meta device: every shape, no memory; `None` is Moshi 7B."""
    import torch
    from moshi.models.loaders import get_moshi_lm

    with refusals("--config-path does not describe a Moshi model: ", AssertionError, KeyError):
        return get_moshi_lm(None, lm_kwargs=lm_kwargs, device="meta", dtype=torch.bfloat16)


def read_config(path: Path) -> dict[str, Any]:
    """The arguments of `LMModel` in a Moshi config.json."""
    with refusals(f"--config-path {path} cannot be read as JSON: ", OSError):
        config = json.loads(path.read_text(encoding="utf-8"))
    with refusals():
        if not isinstance(config, dict):
            raise ValueError(
                f"--config-path {path} must hold a JSON object with the settings of a Moshi model, "
                f"got a {type(config).__name__}"
            )
    return {key: value for key, value in config.items() if key not in NOT_MODEL + NOT_STATE}
